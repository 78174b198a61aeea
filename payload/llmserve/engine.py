"""An engine's process: one driver behind a UNIX socket, speaking llmserve.protocol."""

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from llmcore import logs
from llmcore.notify import notify
from llmserve.errors import ApiError, unavailable
from llmserve.protocol import (
    LINE_LIMIT,
    Cancel,
    Delta,
    Done,
    Failed,
    FinishReason,
    Frame,
    Generate,
    Hello,
    ProtocolError,
    decode,
    encode,
)
from llmserve.sockets import bind_unix

log = logging.getLogger("llmserve.engine")


@dataclass(slots=True)
class Finish:
    """How an answer ended."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class Driver(Protocol):
    """What runs a model."""

    name: str
    revision: str
    context: int
    slots: int
    fields: Sequence[str]  # of wire.OPTIONAL, those that it honours

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Answer `request`, giving each piece of text to `emit` (in the event loop's thread).

        Raises ApiError for what the client did wrong. When cancelled, the model stops within a step.
        """

    async def broken(self) -> str:
        """Wait until it can answer nothing any more, and say why: the process then ends, to be started again."""

    async def close(self) -> None:
        """Stop the model; what is running may be answered before, within seconds."""


class Steady:
    """A driver whose requests fail one by one, and that holds nothing when it stops."""

    async def broken(self) -> str:
        """Never."""
        return await asyncio.Future[str]()

    async def close(self) -> None:
        """Nothing to stop."""


def token_budget(request: Generate, prompt_tokens: int, context: int) -> int:
    """How many tokens the answer may have; raises ApiError if prompt and answer do not fit the context."""
    room = context - prompt_tokens
    if room < 1 or (request.max_tokens > room and not request.clip):
        asked = "" if room < 1 or request.clip else f" and max_tokens is {request.max_tokens}"
        param = "messages" if request.messages is not None else "prompt"
        raise ApiError(
            400,
            "context_length_exceeded",
            f"the prompt has {prompt_tokens} tokens{asked}, the model's context holds {context}: "
            "shorten the prompt or lower max_tokens",
            param,
        )
    return min(request.max_tokens, room)


class EngineServer:
    """Serves one driver to any number of gateways."""

    def __init__(self, model: str, driver: Driver) -> None:
        """`model` is the name under which clients know it."""
        self.driver = driver
        self.hello = Hello(
            model, driver.revision, driver.name, driver.context, driver.slots, [*driver.fields]
        )
        self.slots = asyncio.Semaphore(driver.slots)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one gateway until it hangs up; what it still waits for is then given up."""
        running: dict[int, asyncio.Task[None]] = {}

        def say(frame: Frame) -> None:
            if not writer.is_closing():
                writer.write(encode(frame))

        def forget(number: int, task: asyncio.Task[None]) -> None:
            running.pop(number, None)
            if not task.cancelled() and task.exception():
                log.error("a request's task failed", exc_info=task.exception())

        say(self.hello)
        try:
            while line := await reader.readline():
                frame = decode(line)
                if isinstance(frame, Cancel):
                    if task := running.get(frame.id):
                        task.cancel()
                elif isinstance(frame, Generate):
                    task = asyncio.create_task(self.answer(frame, say))
                    running[frame.id] = task
                    task.add_done_callback(partial(forget, frame.id))
        except (ProtocolError, ValueError, ConnectionError) as error:
            log.warning("a gateway's connection ends", exc_info=error)
        finally:
            for task in list(running.values()):
                task.cancel()
            writer.close()

    async def answer(self, request: Generate, say: Callable[[Frame], None]) -> None:
        """One request from its slot to its last frame."""
        pieces: list[str] = []

        def emit(text: str) -> None:
            if request.stream:
                say(Delta(request.id, text))
            else:
                pieces.append(text)

        try:
            async with self.slots:
                finish = await self.driver.generate(request, emit)
        except ApiError as error:
            say(Failed(request.id, error.status, error.code, error.message, error.param))
        except Exception as error:
            log.exception("the model failed")
            kind = type(error).__name__
            refused = unavailable(
                "engine_failed", f"the model failed with {kind}: ask again, or tell the operator"
            )
            say(Failed(request.id, refused.status, refused.code, refused.message))
        else:
            tokens = finish.prompt_tokens, finish.completion_tokens
            say(Done(request.id, "".join(pieces), finish.reason, *tokens))


async def serve(model: str, driver: Driver, path: Path, mode: int) -> int:
    """Serve `driver` on the UNIX socket `path` until SIGTERM or SIGINT; it is READY once it listens.

    Returns the exit code: 1 if the driver broke.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    logs.guard(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = EngineServer(model, driver)
    listener = bind_unix(path, mode)
    server = await asyncio.start_unix_server(engine.connection, sock=listener, limit=LINE_LIMIT)
    fields = {"model": model, "revision": driver.revision, "driver": driver.name, "context": driver.context}
    log.info("ready", extra={"fields": {**fields, "socket": str(path)}})
    notify("READY=1")
    broken, stopped = asyncio.create_task(driver.broken()), asyncio.create_task(stop.wait())
    await asyncio.wait([broken, stopped], return_when=asyncio.FIRST_COMPLETED)
    if broken.done():
        log.error("the engine ends", extra={"fields": {"model": model, "reason": broken.result()}})
    notify("STOPPING=1")
    server.close()
    path.unlink(missing_ok=True)
    await driver.close()
    return 1 if broken.done() else 0
