"""The gateway's client of the audit writer: each action is on disk before it happens.

The gateway waits for each *intent*: without it nothing is answered. A restart of the writer only delays answers. The *outcome*
that follows, and refusals, are sent without waiting, and retained until the writer acknowledges them; acknowledgements are
cumulative. They are sent with the next intent, or shortly afterwards on their own: sent alone, each would cost the writer a sync.
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
INTENT_SECONDS = 5.0  # time for a record to reach the disk, including a restart of the writer
KEPT = 10_000  # outcomes retained while the writer is away; refusals may use a tenth of it
OUTCOME_SECONDS = 0.01  # how long an outcome waits for an intent to be sent with
RETRY_SECONDS = 0.2
ANSWER_BYTES = 64 * 1024  # a longer acknowledgement is invalid


class Entry:
    """A record on its way; `receipt` is a future only where a request waits for it."""

    __slots__ = ("line", "number", "receipt", "since")

    def __init__(self, line: bytes, receipt: asyncio.Future[None] | None) -> None:
        """`line`: the event as JSON."""
        self.line = line
        self.receipt = receipt
        self.number = 0
        self.since = time.monotonic()


class Connection(asyncio.Protocol):
    """One connection to the writer; `closed` is set to the reason when it ends."""

    def __init__(self, client: "AuditClient") -> None:
        self.client = client
        self.rest = b""
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.client.begin(self.transport)

    def data_received(self, data: bytes) -> None:
        """Acknowledgements, one per line."""
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
        self.client.end()
        self.end(f"{type(exc).__name__}: {exc}" if exc else "it closed the connection")

    def end(self, why: str) -> None:
        """Report the reason to `keep_connected`, once."""
        if not self.closed.done():
            self.closed.set_result(why)


class AuditClient:
    """The connection to the host's audit writer; reconnects by itself."""

    def __init__(self, socket: Path, metrics: Metrics) -> None:
        """Nothing is sent until `keep_connected` runs."""
        self.socket = socket
        self.metrics = metrics
        self.unacknowledged: deque[Entry] = deque()  # sent but not acknowledged, by number
        self.waiting: deque[Entry] = deque()  # not yet sent
        self.suppressed = 0
        self.number = 0
        self.transport: asyncio.Transport | None = None
        self.away_since = time.monotonic()  # valid while there is no transport
        self.flushing = False  # a flush is scheduled for this turn of the event loop
        self.lingering = False  # a flush is scheduled within OUTCOME_SECONDS

    @property
    def up(self) -> bool:
        """Whether a writer is connected."""
        return self.transport is not None

    async def record(self, event: dict[str, object]) -> None:
        """Return once `event` is on disk; otherwise raises ApiError 503."""
        if self.transport is None and time.monotonic() - self.away_since > INTENT_SECONDS:
            raise audit_unavailable()
        loop = asyncio.get_running_loop()
        receipt = loop.create_future()
        self.waiting.append(Entry(to_json(event), receipt))
        if not self.flushing:
            self.flushing = True
            loop.call_soon(self.flush)
        await receipt  # `end_overdue` bounds the wait

    def end_overdue(self) -> None:
        """Fail records that wait too long for the disk; called every second, which is cheaper than a timer per
        record.
        """
        before = time.monotonic() - INTENT_SECONDS
        for entry in (*self.unacknowledged, *self.waiting):
            if entry.since > before:
                break
            if entry.receipt and not entry.receipt.done():
                entry.receipt.set_exception(audit_unavailable())
        if self.transport is None:
            self.forget_refused()

    def forget_refused(self) -> None:
        """Drop intents that have failed, since nothing was done; while the writer is away, they would accumulate
        without bound.
        """
        self.unacknowledged = deque(
            entry for entry in self.unacknowledged if not (entry.receipt and entry.receipt.done())
        )
        self.waiting = deque(entry for entry in self.waiting if not (entry.receipt and entry.receipt.done()))

    def note(self, event: dict[str, object], refusal: bool = False) -> None:
        """Send `event` without waiting. Excess refusals are only counted, and the next one carries the count."""
        if len(self.waiting) + len(self.unacknowledged) >= (KEPT // 10 if refusal else KEPT):
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
        """Send outcomes that were not sent along with an intent."""
        self.lingering = False
        self.flush()

    def flush(self) -> None:
        """Send everything that is waiting in one write."""
        self.flushing = False
        if self.transport is None or not self.waiting:
            return
        lines = []
        for entry in self.waiting:
            self.number += 1
            entry.number = self.number
            lines.append(b'{"n":%d,"event":%b}\n' % (entry.number, entry.line))
        self.unacknowledged.extend(self.waiting)
        self.waiting.clear()
        self.transport.write(b"".join(lines))

    async def settled(self, seconds: float = 3.0) -> None:
        """Wait until everything is acknowledged, for at most `seconds`: this process stops."""
        end = asyncio.get_running_loop().time() + seconds
        while (self.waiting or self.unacknowledged) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        if self.waiting or self.unacknowledged:
            lost = {"records": len(self.waiting) + len(self.unacknowledged)}
            log.error("stopping with unrecorded outcomes", extra={"fields": lost})

    async def keep_connected(self) -> None:
        """Connect, read acknowledgements until the connection ends, and reconnect; runs until cancelled.

        A writer that is away is an error once requests are rejected, after INTENT_SECONDS; before that they wait for
        it. One that closes its connections sooner than that is away, too.
        """
        reported, away_since = "", time.monotonic()
        while True:
            began = time.monotonic()
            try:
                factory = partial(Connection, self)
                transport, connection = await asyncio.get_running_loop().create_unix_connection(
                    factory, str(self.socket)
                )
            except OSError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                try:
                    trouble = await connection.closed
                finally:
                    transport.close()
                if time.monotonic() - began > INTENT_SECONDS:
                    reported, away_since = "", time.monotonic()
            if trouble != reported and time.monotonic() - away_since > INTENT_SECONDS:
                reported = trouble
                fields = {"socket": str(self.socket), "reason": trouble}
                log.error("no audit writer: every request is rejected", extra={"fields": fields})
            await asyncio.sleep(RETRY_SECONDS)

    def begin(self, transport: asyncio.Transport) -> None:
        """Send unacknowledged records first; so a record may be written twice, but is never lost."""
        self.transport, self.number = transport, 0
        self.metrics.audit_up.set(1)
        self.waiting.extendleft(reversed(self.unacknowledged))
        self.unacknowledged.clear()
        self.flush()

    def end(self) -> None:
        """The connection is closed: unacknowledged records are retained for the next one."""
        self.transport, self.away_since = None, time.monotonic()
        self.metrics.audit_up.set(0)
        self.forget_refused()

    def acknowledged(self, line: bytes) -> None:
        """`17`: all records up to 17 are on disk; `!17 reason`: record 17 was rejected for good."""
        refused = line.startswith(b"!")
        number = int(line.removeprefix(b"!").split(maxsplit=1)[0])
        while self.unacknowledged and self.unacknowledged[0].number <= number:
            entry = self.unacknowledged.popleft()
            if entry.receipt is None or entry.receipt.done():
                continue
            if refused and entry.number == number:
                entry.receipt.set_exception(audit_unavailable())
            else:
                entry.receipt.set_result(None)
        if refused:
            log.error(
                "the audit writer rejected a record", extra={"fields": {"reason": line.decode().strip()}}
            )


def audit_unavailable() -> ApiError:
    message = "the request cannot be recorded in the audit record, so it is not answered: retry later"
    return unavailable("audit_unavailable", message, retry_after=2)
