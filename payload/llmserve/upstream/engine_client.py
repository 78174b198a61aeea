"""The gateway's client of one engine: reconnects by itself, and never leaves a request waiting."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from llmcore.config import ConfigError
from llmserve.api.errors import ApiError, unavailable
from llmserve.metrics import EngineState
from llmserve.protocol import (
    LINE_LIMIT,
    Beat,
    Cancel,
    Delta,
    Done,
    Failed,
    Generate,
    Hello,
    ProtocolError,
    decode,
    encode,
)
from llmserve.upstream.admission import Admission, Place, Queue
from llmserve.upstream.offered import OfferedAddress

log = logging.getLogger("llmserve.link")
RETRY_SECONDS = (0.02, 0.05, 0.1, 0.25, 0.5)  # the last one repeats
NUMBERS = count(1)  # request ids, unique within the process across all clients
SILENCE_SECONDS = 5.0  # an engine beats every second; silent for this long, it counts as stopped
# The handshake alone checks certificates and revocation lists, so a connection to another host is replaced after as long.
LINK_SECONDS = 600.0
RETURN_SECONDS = 300.0  # how long a departed engine is expected back; loading a model can take long


class Answer:
    """The frames of one answer, for one reader.

    The reader may set `take`: it is called with a frame that arrives while the reader waits, which avoids a task switch.
    Unless it returns True, the reader gets the frame.
    """

    __slots__ = ("frames", "take", "waiter")

    def __init__(self) -> None:
        self.frames: deque[Delta | Done | Failed] = deque()
        self.take: Callable[[Delta | Done | Failed], bool] | None = None
        self.waiter: asyncio.Future[None] | None = None

    def put(self, frame: Delta | Done | Failed) -> None:
        """Add a frame."""
        waiter = self.waiter
        if waiter is None or waiter.done():
            self.frames.append(frame)
        elif self.take is None or not self.take(frame):
            self.frames.append(frame)
            waiter.set_result(None)

    async def get(self) -> Delta | Done | Failed:
        """The next frame, once it is there."""
        if not self.frames:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.frames.popleft()


class EngineClient:
    """The connection to one engine. `hello` is None while it accepts no requests; `trouble` then says why."""

    def __init__(
        self, model: str, address: Path | OfferedAddress, waiting: Queue, identity: str = ""
    ) -> None:
        """`model`: the name under which the engine must serve it. `waiting`: capacity of its queue. `identity`: its name at the
        gateways of all hosts.
        """
        self.model = model
        self.address = address
        self.socket = Path(str(address))
        self.identity = identity or str(address)
        self.hello: Hello | None = None
        self.last_hello: Hello | None = None  # the departed engine's, until it is back
        self.on_return: Callable[[], None] = lambda: None  # called when the engine has come back
        self.trouble = "not connected yet"
        self.quarantine_reason = ""  # why its GPUs are quarantined on this host, if they are
        self.sick_there = False  # whether its own host says so
        self.admission = Admission(waiting)
        self.beat = Beat(stalled=False)
        self.others = 0  # requests of other gateways, by the last beat
        self.last_frame = 0.0  # time.monotonic() of the last frame
        self.answers: dict[int, tuple[Answer, Place]] = {}
        self.writer: asyncio.StreamWriter | None = None
        self.connections: dict[int, asyncio.StreamWriter] = {}  # the connection of each request
        self.former: set[asyncio.Task[None]] = set()  # connections that were replaced and have requests

    async def keep_connected(self) -> None:
        """Connect, read until the connection ends, fail all pending requests, and reconnect; runs until cancelled."""
        failures = 0
        reported = ""
        while True:
            try:
                await self.hold()
                failures = 0
            except (OSError, ProtocolError, ValueError, ConfigError) as error:
                self.trouble = f"{type(error).__name__}: {error}"
            if self.trouble != reported:
                reported = self.trouble
                fields = {"model": self.model, "socket": str(self.socket), "reason": reported}
                log.warning("engine unavailable", extra={"fields": fields})
            if self.hello or self.answers:
                failures = 0
                lost: dict[str, object] = {"model": self.model, "lost_requests": len(self.answers)}
                log.error("engine lost", extra={"fields": lost})
            self.hello = None
            self.lose(self.writer)
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection; raises OSError or ConfigError."""
        if isinstance(self.address, OfferedAddress):
            return await self.address.connect()
        return await asyncio.open_unix_connection(str(self.address), limit=LINE_LIMIT)

    async def hold(self) -> None:
        """Connect, and return when the connection, or a newer one that replaced it, has ended.

        A connection to another host is replaced every LINK_SECONDS; requests that were started on it finish there. Raises as
        `connect` and `read` do.
        """
        reader, self.writer = await self.connect()
        reading = asyncio.create_task(self.read(reader, self.writer))
        seconds = LINK_SECONDS if isinstance(self.address, OfferedAddress) else None
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=seconds)
                if not reading.done():
                    with suppress(OSError, ConfigError):  # the connection goes on, and is replaced later
                        reader, self.writer = await self.connect()
                        self.former.add(reading)
                        reading.add_done_callback(self.finished)
                        reading = asyncio.create_task(self.read(reader, self.writer))
            await reading
        finally:
            reading.cancel()

    def finished(self, reading: asyncio.Task[None]) -> None:
        """Forget a connection that was replaced; its requests know already if it failed."""
        self.former.discard(reading)
        if not reading.cancelled() and (error := reading.exception()):
            fields = {"model": self.model, "socket": str(self.socket), "reason": str(error)}
            log.warning("a replaced connection failed", extra={"fields": fields})

    def lose(self, writer: asyncio.StreamWriter | None) -> None:
        """Fail the requests of a connection that has ended, and those that were never sent."""
        for number in list(self.answers):
            if self.connections.get(number) in (None, writer):
                self.connections.pop(number, None)
                if answer := self.end(number):
                    answer.put(Failed(number, 503, "engine_lost", self.lost()))

    async def read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Dispatch frames to the waiting requests until the connection ends, or is no longer needed."""
        self.trouble = "it closed the connection"
        try:
            await self.dispatch(reader, writer)
        finally:
            writer.close()
            if writer is not self.writer:
                self.lose(writer)

    async def dispatch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As `read`."""
        while line := await reader.readline():
            frame = decode(line)
            self.last_frame = time.monotonic()
            if isinstance(frame, Delta):
                if waiting := self.answers.get(frame.id):
                    waiting[0].put(frame)
            elif isinstance(frame, Done | Failed):
                self.connections.pop(frame.id, None)
                if answer := self.end(frame.id, frame):
                    answer.put(frame)
            elif isinstance(frame, Beat):
                self.beat = frame
                self.others = max(0, frame.requests - len(self.answers))
                if frame.leaving and self.hello:
                    self.say_goodbye(self.hello)
            elif isinstance(frame, Hello):
                previous, self.hello, self.last_hello = self.hello, self.introduced(frame), None
                self.admission.slots, self.admission.tokens = frame.slots, frame.tokens
                self.admission.room.context = frame.context
                self.beat, self.others = Beat(stalled=False), 0
                if not previous:
                    fields = {"model": self.model, "revision": self.hello.revision, "driver": frame.driver}
                    log.info("engine connected", extra={"fields": fields})
                    self.on_return()
            if self.last_hello and not self.answers:
                self.trouble = "it has stopped as requested"
                return  # the engine waits for this connection to close
            if writer is not self.writer and writer not in self.connections.values():
                return  # replaced, and at its end

    def say_goodbye(self, hello: Hello) -> None:
        """The engine leaves: it finishes its requests, and those in its queue move to another instance or wait until
        it is back.
        """
        self.hello, self.last_hello = None, hello
        log.info("engine leaving", extra={"fields": {"model": self.model, "running": len(self.answers)}})
        self.send_away()

    def send_away(self) -> None:
        """Move queued requests to other instances; running requests finish here."""
        for place in list(self.admission):
            self.admission.dismiss(place, self.absent())

    @property
    def returning(self) -> Hello | None:
        """The Hello of an engine that has left and is expected back, or None."""
        return self.last_hello if time.monotonic() - self.last_frame < RETURN_SECONDS else None

    def introduced(self, hello: Hello) -> Hello:
        """The Hello under this client's model name, which is the engine's model or one of its adapters. Raises
        ProtocolError.
        """
        if hello.model == self.model:
            return hello
        if revision := hello.adapters.get(self.model):
            return replace(hello, model=self.model, revision=revision, adapters={}, parent=hello.model)
        served = ", ".join(f"'{name}'" for name in [hello.model, *hello.adapters])
        raise ProtocolError(f"the engine at {self.socket} serves {served}, not '{self.model}'")

    @property
    def stalled(self) -> bool:
        """Whether work is pending while the engine reports no progress, or is silent."""
        return self.beat.stalled or (
            bool(self.answers) and time.monotonic() - self.last_frame > SILENCE_SECONDS
        )

    def state(self) -> EngineState:
        running, waiting, beat = self.admission.running.total, self.admission.waiting.total, self.beat
        return EngineState(
            self.model,
            self.hello is not None,
            self.stalled,
            running.requests,
            running.tokens,
            waiting.requests,
            waiting.tokens,
            beat.kv_used if self.hello else None,
            beat.gpu_used if self.hello else [],
            int(self.quarantined),
        )

    def lost(self) -> str:
        """Message to a client whose engine has died."""
        return f"the engine of '{self.model}' died while answering: retry in a second"

    def present(self) -> Hello:
        """The Hello of a working engine; raises ApiError 503 while it is unavailable or stalled."""
        if self.hello is None or self.stalled:
            raise self.absent()
        return self.hello

    def absent(self) -> ApiError:
        state = "making no progress" if self.hello and self.stalled else "unavailable"
        message = f"the engine of '{self.model}' is {state}: retry in a few seconds"
        return unavailable("engine_unavailable", message, retry_after=2)

    async def ask(self, request: Generate, place: Place) -> Answer:
        """Wait for a slot and send `request`, whose id is assigned here; returns the queue of the answer's frames.

        Raises ApiError 429 or 503. The slot is released when the engine ends the answer, or by `cancel`.
        """
        await self.admission.enter(place)
        if self.hello is None:
            self.admission.leave(place)
            raise self.absent()
        request.id = next(NUMBERS)
        answer = Answer()
        self.answers[request.id] = answer, place
        if place.ends is not None:
            request.deadline = max(0.0, place.ends - time.monotonic())
        self.send(request)
        return answer

    def end(self, number: int, last: Done | Failed | None = None) -> Answer | None:
        """Release the slot of request `number`; returns its queue, or None if it had ended before. `last`: its last frame."""
        answer, place = self.answers.pop(number, (None, None))
        if place is not None:
            used = last.prompt_tokens + last.completion_tokens if isinstance(last, Done) else 0
            self.admission.leave(place, used)
        return answer

    def cancel(self, number: int) -> None:
        """Stop the engine's work on request `number`, unless it has ended."""
        if self.end(number) is not None:
            self.stop(number)

    def send(self, request: Generate) -> None:
        """Send the request; if the connection is just ending, keep_connected() fails the request."""
        # Written to a closed transport, uvloop raises RuntimeError; asyncio's own loop logs a warning.
        if self.writer and self.hello and not self.writer.is_closing():
            request.adapter = self.model if self.hello.parent else ""
            self.connections[request.id] = self.writer
            self.writer.write(encode(request))

    def stop(self, number: int) -> None:
        """Tell the engine to stop working on request `number`."""
        writer = self.connections.pop(number, None)
        if writer and not writer.is_closing():
            writer.write(encode(Cancel(number)))

    @property
    def up(self) -> bool:
        """Whether it is connected and not stalled."""
        return self.hello is not None and not self.stalled

    @property
    def quarantined(self) -> bool:
        """Whether it runs on GPUs that are quarantined, so that other instances are preferred."""
        return bool(self.quarantine_reason) or self.sick_there

    @property
    def load(self) -> int:
        """Number of running and waiting requests, those of other gateways included as far as the engine reports them."""
        return self.own_load + self.others

    @property
    def own_load(self) -> int:
        """Number of this gateway's running and waiting requests."""
        return self.admission.running.total.requests + self.admission.waiting.total.requests
