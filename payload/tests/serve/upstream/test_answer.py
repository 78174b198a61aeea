"""The frames of one answer, for one reader."""

import asyncio

import pytest

from llmserve.protocol import Delta, Done, Failed
from llmserve.upstream.engine_client import Answer

Frame = Delta | Done | Failed
END = Done(1, "", "stop", 1, 1)


async def reading(answer: Answer) -> asyncio.Task[Frame]:
    """A reader that waits."""
    reader = asyncio.ensure_future(answer.get())
    await asyncio.sleep(0)
    return reader


def test_frames_come_in_their_order() -> None:
    async def run() -> None:
        answer = Answer()
        frames: list[Frame] = [Delta(1, "a"), Delta(1, "b"), END]
        reader = await reading(answer)
        for frame in frames:
            answer.put(frame)
        assert [await reader, await answer.get(), await answer.get()] == frames

    asyncio.run(run())


def test_frames_are_taken_only_while_the_reader_waits_so_that_none_overtakes_another() -> None:
    async def run() -> None:
        answer, taken = Answer(), list[Frame]()

        def take(frame: Frame) -> bool:
            if isinstance(frame, Delta):
                taken.append(frame)
            return isinstance(frame, Delta)

        answer.take = take
        answer.put(Delta(1, "a"))  # nobody waits
        assert await answer.get() == Delta(1, "a")
        reader = await reading(answer)
        answer.put(Delta(1, "b"))
        assert taken == [Delta(1, "b")]
        assert not reader.done()
        answer.put(END)
        answer.put(Delta(1, "c"))  # the reader has not run since
        assert taken == [Delta(1, "b")]
        assert [await reader, await answer.get()] == [END, Delta(1, "c")]

    asyncio.run(run())


def test_no_frame_is_taken_once_the_reader_is_cancelled() -> None:
    async def run() -> None:
        answer = Answer()
        answer.take = lambda _: pytest.fail("the client's request has ended")
        reader = await reading(answer)
        reader.cancel()
        answer.put(Delta(1, "a"))
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert [*answer.frames] == [Delta(1, "a")]

    asyncio.run(run())
