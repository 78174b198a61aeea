"""The writer as a service: clients send events over a UNIX socket, and receive an acknowledgement once these are on disk.

A client sends lines `{"n": 17, "event": {…}}`, `n` rising; the answer `17` says that its record 17 and all earlier
ones that were not refused are on disk; `!17 reason` says that record 17 was not written. Intents and outcomes have a
reserve of the volume to themselves: beyond it the others, as refusals are, are counted, and only their numbers are
written, once a head; `17` then says that 17 is counted. Events that arrive while a group is being written form the
next group. A client that sends faster than the disk writes is not read from.
"""

import asyncio
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from llmproof.chain import DECODER, MAX_LINE, Chain, ChainError, EventError, fields

HEAD_SECONDS = 60.0
WAITING_BYTES = 8 << 20  # of events that are not on disk yet; beyond it no connection is read
CONNECTIONS = 256
RESERVE = 1 << 30  # bytes of a volume for intents and outcomes, or a tenth of a smaller one
CODES = 32  # of records that are only counted, told apart
ROOM = 1024  # bytes of a line around its event
BEFORE_EVENT = re.compile(r'\{"n": ?\d+, ?"event": ?')  # of a message with no further member


class Connection(asyncio.Protocol):
    """A client's connection."""

    transport: asyncio.Transport

    def __init__(self, service: "Service") -> None:
        self.service = service
        self.rest = b""
        self.skipping = False  # the rest of a line that was too long
        self.last = -1
        self.deaf = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, or close it if there are too many."""
        self.transport = cast(asyncio.Transport, transport)
        if len(self.service.connections) >= CONNECTIONS:
            self.transport.abort()
        else:
            self.service.connections.add(self)
            self.listen()

    def listen(self) -> None:
        """Read from it, or pause: while there is no room, and while it does not read its acknowledgements."""
        if self.service.full or self.deaf:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def connection_lost(self, _exc: Exception | None) -> None:
        """The events that it sent are written all the same."""
        self.service.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Process each complete line."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if not self.skipping:
                self.take(line)
            self.skipping = False
        if self.skipping:
            self.rest = b""
        elif len(self.rest) > MAX_LINE + ROOM:
            self.take(self.rest)
            self.skipping, self.rest = True, b""
        self.service.slow_down()

    def take(self, line: bytes) -> None:
        """Add one message to the next group, or refuse it."""
        try:
            if len(line) > MAX_LINE + ROOM:
                raise EventError(f"the line has more than {MAX_LINE + ROOM} bytes: it is too long")
            text = line.decode()
            message = DECODER.decode(text)
            number, event = message["n"], message["event"]
            if type(number) is not int or number <= self.last:
                raise EventError(f"n is {number!r} after {self.last}: it must rise")
            before = BEFORE_EVENT.match(text) if len(message) == 2 else None
            body = fields(event, text[before.end() : text.rindex("}")].strip() if before else "")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            match = re.match(rb'\s*\{\s*"n"\s*:\s*(\d{1,18})\b', line[:100])
            self.answer(
                f"!{int(match[1]) if match else 0} {' '.join(str(error).split()) or type(error).__name__}\n"
            )
            return
        self.last = number
        self.service.hand_in(self, number, body, event)

    def answer(self, text: str) -> None:
        """Send to it, if it is still connected."""
        if not self.transport.is_closing():
            self.transport.write(text.encode())

    def pause_writing(self) -> None:
        """Its buffer is full: stop reading from it."""
        self.deaf = True
        self.listen()

    def resume_writing(self) -> None:
        """Its buffer has drained: read from it again."""
        self.deaf = False
        self.listen()


@dataclass
class Retention:
    """When old files are removed. `hold`: a file of root's; while it exists or cannot be read, none is."""

    keep_days: int
    hold: Path | None = None
    held: str | None = None  # the hold's text, as it is on record

    def apply(self, chain: Chain) -> None:
        """Record the begin or end of a hold; without a hold, remove the oldest file that may be removed. OSError, ChainError."""
        text = self.text()
        if text != self.held:
            action = "hold ended" if text is None else "hold"
            chain.append([{"event.kind": "event", "event.category": ["configuration"], "event.action": action,
                           "event.outcome": "success", "event.reason": text or self.held or ""}])  # fmt: skip
            self.held = text
        if text is None and (path := chain.remove_oldest(datetime.now(UTC), self.keep_days)):
            print(
                f"llm-audit: {path} was removed, older than {self.keep_days} days",
                file=sys.stderr,
                flush=True,
            )

    def text(self) -> str | None:
        """The first 1,000 characters of the hold; None if there is none."""
        try:
            return self.hold.read_text(errors="replace")[:1000].strip() if self.hold else None
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.hold} cannot be read: {error.strerror}"


def withheld(counts: Counter[str]) -> dict[str, object]:
    """The event with the number of records that were only counted."""
    return {
        "event.kind": "event",
        "event.category": ["process"],
        "event.action": "withheld",
        "event.outcome": "success",
        "llmkeep.audit.count": counts.total(),
        "llmkeep.audit.codes": dict(counts),
    }


class Service:
    """Group commit: one group at a time is written and synced in a thread, while the next one is collected."""

    def __init__(
        self,
        chain: Chain,
        head_seconds: float = HEAD_SECONDS,
        retention: Retention | None = None,
        reserve: int = RESERVE,
    ) -> None:
        self.chain, self.head_seconds, self.retention, self.reserve = chain, head_seconds, retention, reserve
        self.connections: set[Connection] = set()
        self.waiting: list[tuple[Connection, int, bytes]] = []
        self.withheld: Counter[str] = Counter()
        self.waiting_bytes = 0
        self.full = False
        self.something = asyncio.Event()
        self.stopping = False
        self.thread = ThreadPoolExecutor(1, "disk")

    def hand_in(self, connection: Connection, number: int, body: bytes, event: Mapping[str, object]) -> None:
        """Add to the next group; without EVENT's body if only the reserve is left and not meant for it."""
        if event.get("llmkeep.audit.phase") not in ("intent", "outcome") and self.is_short():
            code, count = (
                str(event.get("error.code", event.get("event.action")))[:100],
                event.get("llmkeep.audit.count"),
            )
            known = code in self.withheld or len(self.withheld) < CODES
            self.withheld[code if known else "others"] += count if isinstance(count, int) else 1
            body = b""
        self.waiting.append((connection, number, body))
        self.waiting_bytes += len(body)
        self.something.set()

    def is_short(self) -> bool:
        """Whether only the volume's reserve is left."""
        volume = os.statvfs(self.chain.folder)
        return volume.f_bavail * volume.f_frsize < min(self.reserve, volume.f_blocks * volume.f_frsize // 10)

    def slow_down(self) -> None:
        """Start or stop reading from all connections."""
        full = self.stopping or self.waiting_bytes > WAITING_BYTES
        if full != self.full:
            self.full = full
            for connection in self.connections:
                connection.listen()

    async def commit(self) -> None:
        """Write group after group until stopped and nothing waits. Raises ChainError if the writer cannot continue."""
        loop = asyncio.get_running_loop()
        while not self.stopping or self.waiting:
            await self.something.wait()
            self.something.clear()
            group, self.waiting, self.waiting_bytes = self.waiting, [], 0
            if not group:
                continue
            try:
                bodies = [body for _, _, body in group if body]
                if bodies:
                    await loop.run_in_executor(self.thread, self.chain.write, bodies)
            except OSError as error:
                print(
                    f"llm-audit: {len(group)} records were not written: {error}", file=sys.stderr, flush=True
                )
                for connection, number, _ in group:
                    connection.answer(f"!{number} the record cannot be written: {error.strerror}\n")
            else:
                for connection, number in {connection: number for connection, number, _ in group}.items():
                    connection.answer(f"{number}\n")
            self.slow_down()

    async def sign(self) -> None:
        """Record how many events were only counted, and sign a head if there is something new; failures are retried."""
        loop = asyncio.get_running_loop()
        counts, self.withheld = self.withheld, Counter()
        try:
            if counts:
                await loop.run_in_executor(self.thread, self.chain.append, [withheld(counts)])
                print(
                    f"llm-audit: {counts.total()} records were only counted: {self.chain.folder} is short of space",
                    file=sys.stderr,
                )
        except OSError as error:
            self.withheld += counts
            print(f"llm-audit: {counts.total()} records remain counted: {error}", file=sys.stderr, flush=True)
        try:
            await loop.run_in_executor(self.thread, self.chain.sign)
        except OSError as error:
            print(f"llm-audit: no head was signed: {error}", file=sys.stderr, flush=True)

    async def sign_regularly(self) -> None:
        """Sign each `head_seconds`, and remove old files."""
        while True:
            await asyncio.sleep(self.head_seconds)
            await self.sign()
            if self.retention:
                try:
                    await asyncio.get_running_loop().run_in_executor(
                        self.thread, self.retention.apply, self.chain
                    )
                except (OSError, ValueError, ChainError) as error:
                    print(f"llm-audit: nothing was removed: {error}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Stop accepting, write what waits, sign, close."""
        self.stopping = True
        self.slow_down()
        self.something.set()

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        server = await loop.create_unix_server(lambda: Connection(self), sock=listener, backlog=CONNECTIONS)
        await self.sign()  # what a killed writer left without a head
        heads = asyncio.create_task(self.sign_regularly())
        notify("READY=1")
        try:
            await self.commit()
            await self.sign()
        finally:
            heads.cancel()
            server.close()
            for connection in list(self.connections):
                connection.transport.close()
            await asyncio.sleep(0)  # the last answers go out
            self.thread.shutdown()


def serve(
    chain: Chain,
    path: Path,
    mode: int,
    head_seconds: float,
    retention: Retention | None = None,
    reserve: int = RESERVE,
) -> None:
    """Listen at PATH and write until stopped. Raises ChainError, OSError."""
    # Who holds the folder's lock is the only writer, so a socket that is there is a dead one's.
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    path.chmod(mode)
    listener.listen(CONNECTIONS)
    listener.setblocking(False)

    async def main() -> None:
        await Service(chain, head_seconds, retention, reserve).run(listener)

    try:
        asyncio.run(main())
    finally:
        path.unlink(missing_ok=True)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without it this does nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagram:
        datagram.connect("\0" + address[1:] if address.startswith("@") else address)
        datagram.sendall(state.encode())
