"""The gateway's end of the socket to an engine: reconnects by itself, and never leaves a request waiting."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

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

log = logging.getLogger("llmserve.link")
Answer = asyncio.Queue[Delta | Done | Failed]
RETRY_SECONDS = (0.02, 0.05, 0.1, 0.25, 0.5)  # the last one repeats
NUMBERS = count(1)  # ids of requests; no two of a process are the same, whichever link they go by
SILENCE_SECONDS = 5.0  # an engine that beats once a second and was not heard for so long has stopped
RETURN_SECONDS = 300.0  # how long one that said goodbye is expected back; its model may take long to load


class EngineClient:
    """One engine. `hello` is None while it takes no requests, and `trouble` then says why."""

    def __init__(self, model: str, socket: Path, waiting: Queue) -> None:
        """`model` is the name that the engine must say it serves; `waiting` is the room to queue for it."""
        self.model = model
        self.socket = socket
        self.hello: Hello | None = None
        self.left: Hello | None = None  # who said goodbye, until it is back
        self.found: Callable[[], None] = lambda: None  # called when it is there
        self.trouble = "not connected yet"
        self.admission = Admission(waiting)
        self.beat = Beat(stalled=False)
        self.heard = 0.0  # time.monotonic() of the last frame
        self.changed = asyncio.Event()  # set when `hello` may have changed
        self.answers: dict[int, tuple[Answer, Place]] = {}
        self.writer: asyncio.StreamWriter | None = None

    async def keep_connected(self) -> None:
        """Connect, read until the engine dies, tell all who wait, and begin again; runs until cancelled."""
        failures = 0
        reported = ""
        while True:
            try:
                reader, self.writer = await asyncio.open_unix_connection(str(self.socket), limit=LINE_LIMIT)
                try:
                    await self.read(reader)
                    failures = 0
                finally:
                    self.writer.close()
            except (OSError, ProtocolError, ValueError) as error:
                self.trouble = f"{type(error).__name__}: {error}"
            if self.trouble != reported:
                reported = self.trouble
                fields = {"model": self.model, "socket": str(self.socket), "reason": reported}
                log.warning("engine not there", extra={"fields": fields})
            if self.hello or self.answers:
                failures = 0
                lost: dict[str, object] = {"model": self.model, "lost_requests": len(self.answers)}
                log.error("engine lost", extra={"fields": lost})
            self.hello = None
            self.changed.set()
            for number in list(self.answers):
                if answer := self.end(number):
                    answer.put_nowait(Failed(number, 503, "engine_lost", self.lost()))
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Hand every frame to the request that waits for it, until the connection ends."""
        self.trouble = "it closed the connection"
        while line := await reader.readline():
            frame = decode(line)
            self.heard = time.monotonic()
            if isinstance(frame, Delta):
                if waiting := self.answers.get(frame.id):
                    waiting[0].put_nowait(frame)
            elif isinstance(frame, Done | Failed):
                if answer := self.end(frame.id):
                    answer.put_nowait(frame)
            elif isinstance(frame, Beat):
                self.beat = frame
                if frame.leaving and self.hello:
                    self.say_goodbye(self.hello)
            elif isinstance(frame, Hello):
                self.hello, self.left = self.introduced(frame), None
                self.admission.slots, self.admission.tokens = frame.slots, frame.tokens
                self.beat = Beat(stalled=False)
                self.changed.set()
                fields = {"model": self.model, "revision": self.hello.revision, "driver": frame.driver}
                log.info("engine connected", extra={"fields": fields})
                self.found()
            if self.left and not self.answers:
                self.trouble = "it has stopped, as it was told to"
                return  # it waits for this

    def say_goodbye(self, hello: Hello) -> None:
        """It takes nothing more, and ends what it has: who waits for it looks elsewhere, or waits until it is back."""
        self.hello, self.left = None, hello
        log.info("engine leaves", extra={"fields": {"model": self.model, "running": len(self.answers)}})
        for place in list(self.admission.waiting):
            self.admission.dismiss(place, self.absent())

    @property
    def returning(self) -> Hello | None:
        """Who said goodbye and is expected back."""
        return self.left if time.monotonic() - self.heard < RETURN_SECONDS else None

    def introduced(self, hello: Hello) -> Hello:
        """Who answers to this link's name: the engine's model, or one of its adapters. Raises ProtocolError."""
        if hello.model == self.model:
            return hello
        if revision := hello.adapters.get(self.model):
            return replace(hello, model=self.model, revision=revision, adapters={}, parent=hello.model)
        served = ", ".join(f"'{name}'" for name in [hello.model, *hello.adapters])
        raise ProtocolError(f"the engine at {self.socket} serves {served}, not '{self.model}'")

    @property
    def stalled(self) -> bool:
        """Work is pending, and the engine makes no step, or is not heard any more."""
        return self.beat.stalled or (bool(self.answers) and time.monotonic() - self.heard > SILENCE_SECONDS)

    def state(self) -> EngineState:
        """For a scrape."""
        admission, beat = self.admission, self.beat
        return EngineState(
            self.model,
            self.hello is not None,
            self.stalled,
            admission.running,
            admission.running_tokens,
            len(admission.waiting),
            admission.waiting_tokens,
            beat.kv_used if self.hello else None,
            beat.gpu_used if self.hello else [],
        )

    def lost(self) -> str:
        """The sentence for a client whose engine has died."""
        return f"the engine of '{self.model}' has died while it was answering: ask again in a second"

    def present(self) -> Hello:
        """Who answers; raises ApiError 503 while the engine is not there, or stands still."""
        if self.hello is None or self.stalled:
            raise self.absent()
        return self.hello

    def absent(self) -> ApiError:
        """503."""
        state = "there, but makes no step" if self.hello and self.stalled else "not there now"
        message = f"the engine of '{self.model}' is {state}: ask again in a few seconds"
        return unavailable("engine_unavailable", message, retry_after=2)

    async def ask(self, request: Generate, place: Place) -> Answer:
        """Wait for a slot, and send `request`, whose id is chosen here.

        The answer's frames come out of the queue. Raises ApiError 503. The slot is free
        again when the engine has ended the answer, or after `cancel`.
        """
        await self.admission.enter(place)
        if self.hello is None:
            self.admission.leave(place)
            raise self.absent()
        request.id = next(NUMBERS)
        answer: Answer = asyncio.Queue()
        self.answers[request.id] = answer, place
        if place.ends is not None:
            request.deadline = max(0.0, place.ends - time.monotonic())
        self.send(request)
        return answer

    def end(self, number: int) -> Answer | None:
        """Request `number` needs its slot no more; its answer, if it had not ended before."""
        answer, place = self.answers.pop(number, (None, None))
        if place is not None:
            self.admission.leave(place)
        return answer

    def cancel(self, number: int) -> None:
        """Stop the engine's work on request `number`, if it has not ended by itself."""
        if self.end(number) is not None:
            self.stop(number)

    def send(self, request: Generate) -> None:
        """Hand the request over; where the connection is just ending, all who wait are told."""
        if self.writer and self.hello:
            request.adapter = self.model if self.hello.parent else ""
            self.writer.write(encode(request))

    def stop(self, number: int) -> None:
        """Nobody waits for request `number` any more."""
        if self.writer:
            self.writer.write(encode(Cancel(number)))

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self.hello is not None and not self.stalled

    @property
    def load(self) -> int:
        """Requests that run here or wait to."""
        return self.admission.running + len(self.admission.waiting)
