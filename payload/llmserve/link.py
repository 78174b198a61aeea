"""The gateway's end of the socket to an engine: reconnects by itself, and never leaves a request waiting."""

import asyncio
import logging
from itertools import count
from pathlib import Path

from llmserve.admission import Admission
from llmserve.errors import ApiError, unavailable
from llmserve.protocol import (
    LINE_LIMIT,
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

log = logging.getLogger("llmserve.link")
Answer = asyncio.Queue[Delta | Done | Failed]
RETRY_SECONDS = (0.02, 0.05, 0.1, 0.25, 0.5)  # the last one repeats
NUMBERS = count(1)  # ids of requests; no two of a process are the same, whichever link they go by


class EngineLink:
    """One engine. `hello` is None while it is not there, and `trouble` then says why."""

    def __init__(self, model: str, socket: Path, waiting: int) -> None:
        """`model` is the name that the engine must say it serves; `waiting` requests may queue for it."""
        self.model = model
        self.socket = socket
        self.hello: Hello | None = None
        self.trouble = "not connected yet"
        self.admission = Admission(waiting)
        self.changed = asyncio.Event()  # set when `hello` may have changed
        self.answers: dict[int, Answer] = {}
        self.writer: asyncio.StreamWriter | None = None

    async def keep_connected(self) -> None:
        """Connect, read until the engine dies, tell all who wait, and begin again; runs until cancelled."""
        failures = 0
        told = ""
        while True:
            try:
                reader, self.writer = await asyncio.open_unix_connection(str(self.socket), limit=LINE_LIMIT)
                try:
                    await self.read(reader)
                    failures = 0
                    self.trouble = "it closed the connection"
                finally:
                    self.writer.close()
            except (OSError, ProtocolError, ValueError) as error:
                self.trouble = f"{type(error).__name__}: {error}"
            if self.trouble != told:
                told = self.trouble
                fields = {"model": self.model, "socket": str(self.socket), "reason": told}
                log.warning("engine not there", extra={"fields": fields})
            if self.hello:
                failures = 0
                lost: dict[str, object] = {"model": self.model, "lost_requests": len(self.answers)}
                log.error("engine lost", extra={"fields": lost})
            self.hello = None
            self.changed.set()
            for number, answer in list(self.answers.items()):
                answer.put_nowait(Failed(number, 503, "engine_lost", self.lost()))
                self.end(number)
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Hand every frame to the request that waits for it, until the connection ends."""
        while line := await reader.readline():
            frame = decode(line)
            if isinstance(frame, Delta):
                if answer := self.answers.get(frame.id):
                    answer.put_nowait(frame)
            elif isinstance(frame, Done | Failed):
                if answer := self.end(frame.id):
                    answer.put_nowait(frame)
            elif isinstance(frame, Hello):
                if frame.model != self.model:
                    raise ProtocolError(
                        f"the engine at {self.socket} serves '{frame.model}', not '{self.model}'"
                    )
                self.admission.slots = frame.slots
                self.hello = frame
                self.changed.set()
                fields = {"model": frame.model, "revision": frame.revision, "driver": frame.driver}
                log.info("engine connected", extra={"fields": fields})

    def lost(self) -> str:
        """The sentence for a client whose engine has died."""
        return f"the engine of '{self.model}' has died while it was answering: ask again in a second"

    def present(self) -> Hello:
        """Who answers; raises ApiError 503 while the engine is not there."""
        if self.hello is None:
            raise self.absent()
        return self.hello

    def absent(self) -> ApiError:
        """503."""
        message = f"the engine of '{self.model}' is not there now: ask again in a few seconds"
        return unavailable("engine_unavailable", message, retry_after=2)

    async def ask(self, request: Generate, seconds: float) -> Answer:
        """Wait up to `seconds` for a slot, and send `request`, whose id is chosen here.

        The answer's frames come out of the queue. Raises ApiError 503. The slot is free
        again when the engine has ended the answer, or after `cancel`.
        """
        await self.admission.enter(seconds)
        if self.hello is None:
            self.admission.leave()
            raise self.absent()
        request.id = next(NUMBERS)
        answer = self.answers[request.id] = asyncio.Queue()
        self.send(request)
        return answer

    def end(self, number: int) -> Answer | None:
        """Request `number` needs its slot no more; its answer, if it had not ended before."""
        answer = self.answers.pop(number, None)
        if answer is not None:
            self.admission.leave()
        return answer

    def cancel(self, number: int) -> None:
        """Stop the engine's work on request `number`, if it has not ended by itself."""
        if self.end(number) is not None:
            self.stop(number)

    def send(self, request: Generate) -> None:
        """Hand the request over; where the connection is just ending, all who wait are told."""
        if self.writer:
            self.writer.write(encode(request))

    def stop(self, number: int) -> None:
        """Nobody waits for request `number` any more."""
        if self.hello and self.writer:
            self.writer.write(encode(Cancel(number)))

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self.hello is not None

    @property
    def load(self) -> int:
        """Requests that run here or wait to."""
        return self.admission.running + len(self.admission.waiting)
