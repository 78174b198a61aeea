"""Single flight: an answer that is being made serves all who ask the same meanwhile.

No client makes it: a task of its own asks the engine, and goes on as long as somebody listens. So whoever asked first may
leave, or read slowly, without harm to the others. Where the engine fails, the one who asked first is told so, and the next
one asks again.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from llmserve.api.errors import ApiError
from llmserve.cache.exact import CacheKey, ExactCache
from llmserve.metrics import Metrics
from llmserve.protocol import Delta, Done, Failed, Generate
from llmserve.upstream.admission import Place
from llmserve.upstream.engine_client import Answer
from llmserve.upstream.instances import RoutedRequest

log = logging.getLogger("llmserve.shared")


class Shared:
    """One answer on its way. Streams hear every piece; who wants it whole hears only the end."""

    def __init__(self) -> None:
        """Nobody listens yet."""
        self.pieces: list[str] = []
        self.end: Done | Failed | None = None
        self.streams: dict[Answer, bool] = {}
        self.task: asyncio.Task[None] | None = None

    def listen(self, stream: bool) -> Answer:
        """All that comes, and all that has come."""
        answer: Answer = asyncio.Queue()
        if stream:
            for text in self.pieces:
                answer.put_nowait(Delta(0, text))
        if self.end:
            answer.put_nowait(self.end)
        self.streams[answer] = stream
        return answer

    def piece(self, frame: Delta) -> None:
        """One more."""
        self.pieces.append(frame.text)
        for answer, stream in self.streams.items():
            if stream:
                answer.put_nowait(frame)

    def finish(self, end: Done | Failed) -> None:
        """The last frame."""
        self.end = end
        if isinstance(end, Done):
            end.text = "".join(self.pieces)
        for answer in self.streams:
            answer.put_nowait(end)


class SharedAnswers:
    """All that are on their way, by their key, which names the tenant."""

    def __init__(self, metrics: Metrics) -> None:
        """None yet."""
        self.metrics = metrics
        self.running: dict[CacheKey, Shared] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def join(
        self,
        key: CacheKey,
        request: Generate,
        place: Callable[[], Place],
        routed: RoutedRequest,
        cache: ExactCache,
        fresh: bool,
    ) -> tuple[Answer, Callable[[], None], bool]:
        """The answer's frames, how to leave, and whether it is this request that made the engine be asked.

        `fresh`: an answer that was begun before is not wanted.
        """
        shared = None if fresh else self.running.get(key)
        first = shared is None
        if shared is None:
            shared = self.running[key] = Shared()
            shared.task = asyncio.create_task(self.make(key, shared, request, place(), routed, cache))
            self.tasks.add(shared.task)  # the event loop keeps only weak references
            shared.task.add_done_callback(self.tasks.discard)
        answer = shared.listen(request.stream)

        def leave() -> None:
            shared.streams.pop(answer, None)
            if not shared.streams and shared.end is None and shared.task:
                self.forget(key, shared)
                shared.task.cancel()

        return answer, leave, first

    def forget(self, key: CacheKey, shared: Shared) -> None:
        """Nobody joins it any more."""
        if self.running.get(key) is shared:
            del self.running[key]

    async def make(
        self,
        key: CacheKey,
        shared: Shared,
        request: Generate,
        place: Place,
        routed: RoutedRequest,
        cache: ExactCache,
    ) -> None:
        """Ask, pass on, keep."""
        asked = replace(request, stream=True)
        frame: Delta | Done | Failed
        try:
            frame, answer = await routed.begin(asked, place)
            self.metrics.of(routed.model).queue.observe(routed.queued)
            try:
                while isinstance(frame, Delta):
                    if frame.text:  # an upstream's events are told again as text, to all alike
                        shared.piece(Delta(0, frame.text))
                    frame = await answer.get()
            finally:
                routed.cancel(asked.id)
        except ApiError as error:
            frame = Failed(0, error.status, error.code, error.message, error.param)
        except Exception as error:
            log.exception("an answer for several could not be made")
            frame = Failed(0, 500, "internal_error", f"the gateway failed with {type(error).__name__}")
        if isinstance(frame, Failed):
            self.forget(key, shared)  # before they are told, so that the next one begins anew
            shared.finish(frame)
            return
        shared.finish(frame)
        try:
            await cache.put(key, shared.pieces, frame)
        finally:
            self.forget(key, shared)
