"""An engine process: one driver behind a UNIX socket, speaking llmserve.protocol."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llmcore import logs
from llmcore.notify import notify, watchdog_seconds
from llmserve.api.errors import ApiError, deadline_exceeded, unavailable
from llmserve.engine.choices import MORE_THAN_TEXT, Choice
from llmserve.engine.gpu import Gpus
from llmserve.protocol import (
    LINE_LIMIT,
    Beat,
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
from llmserve.signals import StopSignals
from llmserve.sockets import bind_unix

log = logging.getLogger("llmserve.engine")
BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.02
HANG_UP_SECONDS = 1.0  # gateways of an earlier release do not close: they ignore `leaving`


@dataclass(slots=True)
class Finish:
    """How an answer ended. `calls`: of functions, as in OpenAI's messages. `chances`: for each token its text and log
    probability, and those of the likeliest there; empty if the request does not want them.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    calls: list[dict[str, Any]] = field(default_factory=list)
    chances: list[list[tuple[str, float]]] = field(default_factory=list)


class Driver(Protocol):
    """Runs a model."""

    name: str
    revision: str
    context: int
    slots: int
    fields: Sequence[str]  # supported fields of protocol.OPTIONAL
    dimensions: int  # of its vectors; 0 for a text model
    tokens: int  # as in Hello
    template: str
    adapters: Mapping[str, str]  # as in Hello
    prompts: Mapping[str, str]  # as in Hello
    least_similarity: Mapping[str, float]  # as in Hello

    def kv_used(self) -> float | None:
        """As in Beat."""

    async def generate(self, request: Generate, emit: Callable[[str], None]) -> Finish:
        """Answer `request`, passing each piece of text to `emit` in the event loop's thread. An empty piece only
        signals progress.

        Raises ApiError for errors of the client. When cancelled, the model stops within one step.
        """

    async def broken(self) -> str:
        """Wait until the driver can no longer answer; returns the reason. The process then exits and is restarted."""

    async def close(self) -> None:
        """Stop the model; running requests may be finished first, within seconds."""


class Steady:
    """Base of drivers whose requests fail one by one, and that need no cleanup."""

    prompts: Mapping[str, str] = {}
    least_similarity: Mapping[str, float] = {}

    async def broken(self) -> str:
        """Never returns."""
        return await asyncio.Future[str]()

    async def close(self) -> None:
        """Does nothing."""


def token_budget(request: Generate, prompt_tokens: int, context: int) -> int:
    """Maximum number of tokens of the answer; raises ApiError if prompt and answer do not fit into the context."""
    room = context - prompt_tokens
    if room < 1 or (request.max_tokens > room and not request.clip):
        requested = "" if room < 1 or request.clip else f" and {request.length_field} is {request.max_tokens}"
        param = "messages" if request.messages is not None else "prompt"
        raise ApiError(
            400,
            "context_length_exceeded",
            f"the prompt has {prompt_tokens} tokens{requested}, the model's context holds {context}: "
            f"shorten the prompt{f' or lower {request.length_field}' if requested else ''}",
            param,
        )
    return min(request.max_tokens, room)


class EngineServer:
    """Serves one driver to any number of gateways."""

    def __init__(self, model: str, driver: Driver, stall_seconds: float) -> None:
        """`model`: name of the model for clients. After `stall_seconds` of pending work without a step it counts as
        stalled.
        """
        self.driver = driver
        self.hello = Hello(
            model,
            driver.revision,
            driver.name,
            driver.context,
            driver.slots,
            [*driver.fields],
            driver.dimensions,
            driver.tokens,
            driver.template,
            adapters=dict(driver.adapters),
            prompts=dict(driver.prompts),
            least_similarity=dict(driver.least_similarity),
        )
        self.slots = asyncio.Semaphore(driver.slots)
        self.gpus = Gpus()
        self.stall_seconds = stall_seconds
        self.pending = 0
        self.last_step = time.monotonic()
        self.leaving = False
        self.gateways: dict[Callable[[Frame], None], asyncio.StreamWriter] = {}

    def step(self) -> None:
        """Note that the model has made progress."""
        self.last_step = time.monotonic()

    @property
    def stalled(self) -> bool:
        """Whether work is pending without progress."""
        return self.pending > 0 and time.monotonic() - self.last_step > self.stall_seconds

    async def beat(self) -> None:
        """Report the state to gateways and service manager every second; runs until cancelled.

        A stalled engine stops notifying the manager, which then kills and restarts it (WatchdogSec=). So does one
        whose event loop hangs, or that is stopped by a signal, which no code in the process could detect.
        """
        patience, reported = watchdog_seconds(), False
        pause = min(BEAT_SECONDS, patience / 3) if patience else BEAT_SECONDS
        while True:
            stalled = self.stalled
            if not stalled and patience:
                notify("WATCHDOG=1")
            if stalled and not reported:
                fields = {"pending": self.pending, "seconds": round(time.monotonic() - self.last_step, 1)}
                log.critical("the model makes no progress", extra={"fields": fields})
            reported = stalled
            frame = self.how_it_is()
            for say in self.gateways:
                say(frame)
            await asyncio.sleep(pause)

    def how_it_is(self) -> Beat:
        """The engine's current state."""
        return Beat(self.stalled, self.driver.kv_used(), self.gpus.used(), self.leaving, self.pending)

    async def leave(self, seconds: float, now: asyncio.Event) -> None:
        """Announce the stop, finish running requests for at most `seconds` or until `now` is set, and cancel the
        rest.

        Gateways close their connections once they have all their answers. So no gateway writes to a socket that is being closed,
        which would lose everything that it has not read yet, including the announcement.
        """
        self.leaving = True
        for say in self.gateways:
            say(self.how_it_is())
        log.info("leaving", extra={"fields": {"in_flight": self.pending, "seconds": seconds}})
        end = time.monotonic() + seconds
        while self.pending and not now.is_set() and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)
        end = time.monotonic() + HANG_UP_SECONDS
        while self.gateways and not self.pending and not now.is_set() and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)
        for writer in self.gateways.values():
            writer.close()
        end = time.monotonic() + HANG_UP_SECONDS
        while self.gateways and time.monotonic() < end:
            await asyncio.sleep(LOOK_SECONDS)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one gateway until it disconnects; its pending requests are then cancelled."""
        running: dict[int, asyncio.Task[None]] = {}

        def say(frame: Frame) -> None:
            if not writer.is_closing():
                writer.write(encode(frame))

        def forget(number: int, task: asyncio.Task[None]) -> None:
            running.pop(number, None)
            if not task.cancelled() and task.exception():
                log.error("a request's task failed", exc_info=task.exception())

        say(self.hello)
        self.gateways[say] = writer
        if self.leaving:
            say(self.how_it_is())
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
            log.warning("a gateway's connection failed", exc_info=error)
        finally:
            self.gateways.pop(say)
            for task in list(running.values()):
                task.cancel()
            writer.close()

    async def answer(self, request: Generate, say: Callable[[Frame], None]) -> None:
        """Run one request from its slot to its last frame."""
        if not self.pending:
            self.step()  # an idle engine was not stalled
        self.pending += 1
        deadline = asyncio.timeout(request.deadline)
        try:
            if self.leaving:
                raise unavailable("engine_unavailable", "this engine is stopping: retry")
            if request.adapter and request.adapter not in self.driver.adapters:
                raise unavailable(
                    "engine_unavailable",
                    f"this engine has no adapter '{request.adapter}': GET /v1/models lists what is served",
                )
            async with deadline, self.slots:
                frame = await (self.choices if request.extra.keys() & MORE_THAN_TEXT else self.text)(
                    request, say
                )
        except ApiError as error:
            say(Failed(request.id, error.status, error.code, error.message, error.param))
        except Exception as error:
            if deadline.expired():
                refused = deadline_exceeded(round(request.deadline or 0, 1))
            else:
                log.exception("the model failed", extra={"fields": {"traceparent": request.traceparent}})
                kind = type(error).__name__
                refused = unavailable(
                    "engine_failed", f"the model failed with {kind}: retry, or tell the operator"
                )
            say(Failed(request.id, refused.status, refused.code, refused.message))
        else:
            say(frame)
        finally:
            self.pending -= 1
            self.step()

    async def text(self, request: Generate, say: Callable[[Frame], None]) -> Done:
        """Answer with one text."""
        pieces: list[str] = []

        def emit(text: str) -> None:
            self.step()
            if not text:
                return
            if request.stream:
                say(Delta(request.id, text))
            else:
                pieces.append(text)

        finish = await self.driver.generate(request, emit)
        return Done(
            request.id, "".join(pieces), finish.reason, finish.prompt_tokens, finish.completion_tokens
        )

    async def choices(self, request: Generate, say: Callable[[Frame], None]) -> Done:
        """Answer with choices, one after the other. Each has a seed of its own, derived from the request's."""
        answered: list[tuple[Choice, Finish]] = []
        for number in range(request.answers):
            choice = Choice(request, number)

            def emit(text: str, choice: Choice = choice) -> None:
                self.step()
                if piece := choice.piece(text):
                    say(piece)

            seed = None if request.seed is None else request.seed + number
            finish = await self.driver.generate(replace(request, seed=seed), emit)
            if request.stream:
                say(choice.last(finish.reason, finish.calls, finish.chances))
            answered.append((choice, finish))
        first, finish = answered[0]
        frame = Done(
            request.id,
            "",
            finish.reason,
            finish.prompt_tokens,
            sum(each.completion_tokens for _, each in answered),
        )
        if not request.stream:
            frame.text = "".join(first.pieces)
            frame.choices = [choice.whole(how.reason, how.calls, how.chances) for choice, how in answered]
        return frame


async def serve(
    model: str, driver: Driver, path: Path, mode: int, stall_seconds: float, drain_seconds: float
) -> int:
    """Serve `driver` on the UNIX socket `path` until SIGTERM or SIGINT, then finish running requests for at most
    `drain_seconds`; a second signal stops at once. Notifies READY once it listens.

    Returns the exit code: 1 if the driver broke.
    """
    logs.guard(asyncio.get_running_loop())
    stop = StopSignals()
    engine = EngineServer(model, driver, stall_seconds)
    listener = bind_unix(path, mode)
    server = await asyncio.start_unix_server(engine.connection, sock=listener, limit=LINE_LIMIT)
    fields = {"model": model, "revision": driver.revision, "driver": driver.name, "context": driver.context}
    log.info("ready", extra={"fields": {**fields, "socket": str(path)}})
    notify("READY=1")
    beating = asyncio.create_task(engine.beat())
    broken, stopped = asyncio.create_task(driver.broken()), asyncio.create_task(stop.requested.wait())
    await asyncio.wait([broken, stopped], return_when=asyncio.FIRST_COMPLETED)
    if broken.done():
        log.error("the engine failed", extra={"fields": {"model": model, "reason": broken.result()}})
    notify("STOPPING=1")
    server.close()
    path.unlink(missing_ok=True)
    if not broken.done():
        await engine.leave(drain_seconds, stop.now)
    beating.cancel()
    await driver.close()
    return 1 if broken.done() else 0
