"""The gateway's side of the audit record: what is about to happen is on disk before it happens.

An *intent* is waited for: without it nothing is answered; a writer that is started anew costs its time and no answer. The
*outcome* that follows, and refusals, are sent without waiting, and kept until the writer has them; the writer's
acknowledgements are cumulative. They travel with the next intent, or a moment later by themselves: a record of their own
would cost the writer a sync of its own.
"""

import asyncio
import logging
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import cast

from pydantic_core import to_json

from llmserve.api.errors import ApiError, unavailable
from llmserve.metrics import Metrics

log = logging.getLogger("llmserve.audit")
INTENT_SECONDS = 5.0  # how long a record may take to reach the disk, by a writer that was started anew too
KEPT = 10_000  # outcomes that wait for a writer that is away; refusals wait in a tenth of it
OUTCOME_SECONDS = 0.01  # how long an outcome waits for an intent to travel with
RETRY_SECONDS = 0.2
ANSWER_BYTES = 64 * 1024  # an acknowledgement that is longer is none


class Entry:
    """A record on its way; `done` is there for those that somebody waits for."""

    __slots__ = ("done", "line", "number", "since")

    def __init__(self, line: bytes, done: asyncio.Future[None] | None) -> None:
        """`line` is the event as JSON."""
        self.line = line
        self.done = done
        self.number = 0
        self.since = time.monotonic()


class Connection(asyncio.Protocol):
    """One connection to the writer; `closed` says why it ended."""

    def __init__(self, client: "AuditClient") -> None:
        """The link hears what comes."""
        self.client = client
        self.rest = b""
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        self.client.begin(self.transport)

    def data_received(self, data: bytes) -> None:
        """Acknowledgements, one a line."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            for line in lines:
                self.client.acknowledged(line)
            if len(self.rest) > ANSWER_BYTES:
                raise ValueError(f"an acknowledgement has more than {ANSWER_BYTES} bytes")
        except (ValueError, LookupError) as error:
            self.end(f"{type(error).__name__}: {error}")
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The writer is gone."""
        self.client.end()
        self.end(f"{type(exc).__name__}: {exc}" if exc else "it closed the connection")

    def end(self, why: str) -> None:
        """Tell `keep_connected`, once."""
        if not self.closed.done():
            self.closed.set_result(why)


class AuditClient:
    """The connection to the host's one writer; reconnects by itself."""

    def __init__(self, socket: Path, metrics: Metrics) -> None:
        """Nothing is sent before `keep_connected` runs."""
        self.socket = socket
        self.metrics = metrics
        self.sent: deque[Entry] = deque()  # not yet acknowledged, in the order of their numbers
        self.waiting: deque[Entry] = deque()  # not yet sent
        self.suppressed = 0
        self.number = 0
        self.transport: asyncio.Transport | None = None
        self.away_since = time.monotonic()  # where there is no transport
        self.flushing = False  # in this turn of the event loop
        self.lingering = False  # in OUTCOME_SECONDS

    @property
    def up(self) -> bool:
        """Whether there is a writer."""
        return self.transport is not None

    async def record(self, event: dict[str, object]) -> None:
        """Return when `event` is on disk; raises ApiError 503 otherwise."""
        if self.transport is None and time.monotonic() - self.away_since > INTENT_SECONDS:
            raise audit_unavailable()
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self.waiting.append(Entry(to_json(event), done))
        if not self.flushing:
            self.flushing = True
            loop.call_soon(self.flush)
        await done  # `end_overdue` sees to it that this ends

    def end_overdue(self) -> None:
        """Tell those who have waited too long for the disk; to be called each second, cheaper than a timer each."""
        before = time.monotonic() - INTENT_SECONDS
        for entry in (*self.sent, *self.waiting):
            if entry.since > before:
                break
            if entry.done and not entry.done.done():
                entry.done.set_exception(audit_unavailable())
        if self.transport is None:
            self.forget_refused()

    def forget_refused(self) -> None:
        """What was not done needs no record; while the writer is away, they would grow without bound."""
        self.sent = deque(entry for entry in self.sent if not (entry.done and entry.done.done()))
        self.waiting = deque(entry for entry in self.waiting if not (entry.done and entry.done.done()))

    def note(self, event: dict[str, object], refusal: bool = False) -> None:
        """Send `event` without waiting. Refusals that a flood makes are counted, and the count is in the next one."""
        if len(self.waiting) + len(self.sent) >= (KEPT // 10 if refusal else KEPT):
            self.suppressed += 1
            self.metrics.audit_suppressed.inc()
            return
        if self.suppressed:
            event["llmkeep.audit.suppressed"] = self.suppressed
            self.suppressed = 0
        self.waiting.append(Entry(to_json(event), None))
        if not self.lingering:
            self.lingering = True
            asyncio.get_running_loop().call_later(OUTCOME_SECONDS, self.flush_late)

    def flush_late(self) -> None:
        """No intent took them along."""
        self.lingering = False
        self.flush()

    def flush(self) -> None:
        """One write for all that waits."""
        self.flushing = False
        if self.transport is None or not self.waiting:
            return
        lines = []
        for entry in self.waiting:
            self.number += 1
            entry.number = self.number
            lines.append(b'{"n":%d,"event":%b}\n' % (entry.number, entry.line))
        self.sent.extend(self.waiting)
        self.waiting.clear()
        self.transport.write(b"".join(lines))

    async def settled(self, seconds: float = 3.0) -> None:
        """Wait until the writer has everything, but not for ever: this process stops."""
        end = asyncio.get_running_loop().time() + seconds
        while (self.waiting or self.sent) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        if self.waiting or self.sent:
            lost = {"records": len(self.waiting) + len(self.sent)}
            log.error("stopping with outcomes that nobody recorded", extra={"fields": lost})

    async def keep_connected(self) -> None:
        """Connect, read acknowledgements until the writer goes, and begin again; runs until cancelled."""
        reported = ""
        while True:
            try:
                made = partial(Connection, self)
                transport, connection = await asyncio.get_running_loop().create_unix_connection(
                    made, str(self.socket)
                )
            except OSError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                reported = ""
                try:
                    trouble = await connection.closed
                finally:
                    transport.close()
            if trouble != reported:
                reported = trouble
                fields = {"socket": str(self.socket), "reason": trouble}
                log.error("no audit writer: nothing is answered", extra={"fields": fields})
            await asyncio.sleep(RETRY_SECONDS)

    def begin(self, transport: asyncio.Transport) -> None:
        """What was not acknowledged goes first; a record may so be written twice, and is never lost."""
        self.transport, self.number = transport, 0
        self.metrics.audit_up.set(1)
        self.waiting.extendleft(reversed(self.sent))
        self.sent.clear()
        self.flush()

    def end(self) -> None:
        """The writer is gone: what it has not acknowledged is kept for the next one."""
        self.transport, self.away_since = None, time.monotonic()
        self.metrics.audit_up.set(0)
        self.forget_refused()

    def acknowledged(self, line: bytes) -> None:
        """`17` says that all up to record 17 are on disk; `!17 reason` that this one never will be."""
        refused = line.startswith(b"!")
        number = int(line.removeprefix(b"!").split(maxsplit=1)[0])
        while self.sent and self.sent[0].number <= number:
            entry = self.sent.popleft()
            if entry.done is None or entry.done.done():
                continue
            if refused and entry.number == number:
                entry.done.set_exception(audit_unavailable())
            else:
                entry.done.set_result(None)
        if refused:
            log.error(
                "the audit writer refuses a record", extra={"fields": {"reason": line.decode().strip()}}
            )


def audit_unavailable() -> ApiError:
    """503."""
    message = "what you ask for cannot be recorded now, so it is not done: ask again later"
    return unavailable("audit_unavailable", message, retry_after=2)
