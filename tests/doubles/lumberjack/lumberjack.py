"""Lumberjack v2, which Beats speak to Logstash: frames of bounded size are read, a window is acknowledged once it is taken."""

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

WINDOW = 65_536  # events
FRAME = 16 << 20  # bytes of one document, and of one compressed frame
UNPACKED = 64 << 20  # bytes of what is in a compressed frame
KEEPALIVE_SECONDS = 3
ABBREVIATIONS = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
}

Event = dict[str, Any]
Take = Callable[[list[Event], str], Awaitable[None]]
Wanted = Generator[int, bytes, tuple[str, Any]]


class Refused(Exception):
    """What came is not Lumberjack v2, or is larger than is read."""


def number(data: bytes, most: int = 0xFFFFFFFF, what: str = "a number") -> int:
    (found,) = struct.unpack(">I", data)
    if found > most:
        raise Refused(f"{what}: {found}, and {most} is the most")
    return int(found)


def document(data: bytes) -> Event:
    try:
        found = json.loads(data)
    except ValueError as problem:
        raise Refused(f"a frame that is no JSON: {problem}") from problem
    if not isinstance(found, dict):
        raise Refused(f"a document that is {type(found).__name__}")
    return found


def unpacked(data: bytes) -> bytes:
    packed = zlib.decompressobj()
    try:
        found = packed.decompress(data, UNPACKED)
    except zlib.error as problem:
        raise Refused(f"a compressed frame: {problem}") from problem
    if not packed.eof:
        raise Refused(f"a compressed frame that is cut, or has more than {UNPACKED} bytes")
    return found


def frame() -> Wanted:
    """One frame: yields how many bytes it wants, is sent them, and returns the frame's kind and what is in it."""
    head = (yield 2).decode("latin-1")
    version, kind = head[0], head[1]
    if version != "2":
        raise Refused(f"version {version!r}")
    if kind == "W":
        return kind, number((yield 4), WINDOW, "events in a window")
    if kind == "J":
        sequence = number((yield 4))
        size = number((yield 4), FRAME, "bytes of a document")
        return kind, (sequence, document((yield size)))
    if kind == "C":
        size = number((yield 4), FRAME, "bytes of a compressed frame")
        return kind, unpacked((yield size))
    raise Refused(f"a frame {kind!r}")


async def read(reader: asyncio.StreamReader) -> tuple[str, Any]:
    wanted = frame()
    size = next(wanted)
    while True:
        data = await reader.readexactly(size)
        try:
            size = wanted.send(data)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def within(data: bytes) -> list[tuple[int, Event]]:
    """The documents of a compressed frame, which has no other kind of frame in it."""
    found, place = [], 0
    while place < len(data):
        wanted = frame()
        size = next(wanted)
        while True:
            if place + size > len(data):
                raise Refused("a frame that ends outside the compressed one")
            part, place = data[place : place + size], place + size
            try:
                size = wanted.send(part)
            except StopIteration as done:
                kind, value = done.value
                break
        if kind != "J":
            raise Refused(f"a frame {kind!r} in a compressed one")
        found.append(value)
    return found


async def windows(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, list[Event]]]:
    """Of each window its last sequence number and its documents; ends where the client does, between two frames."""
    size = 0
    events: list[Event] = []
    while True:
        try:
            kind, value = await read(reader)
        except asyncio.IncompleteReadError as cut:
            if cut.partial or events:
                raise Refused("a window that is cut") from cut
            return
        if kind == "W":
            size, events = value, []
            continue
        frames = within(value) if kind == "C" else [value]
        events += [event for _, event in frames]
        if len(events) > size:
            raise Refused(f"{len(events)} documents in a window of {size}")
        if frames and len(events) == size:
            yield frames[-1][0], events
            size, events = 0, []


def subject(certificate: dict[str, Any]) -> str:
    """As Java's X500Principal.getName() writes it; certificates of the estate have a common name and nothing else."""
    names = [part for group in certificate.get("subject", ()) for part in group]
    return ",".join(f"{ABBREVIATIONS.get(name, name)}={value}" for name, value in reversed(names))


def acknowledgement(sequence: int) -> bytes:
    return b"2A" + struct.pack(">I", sequence)


def receiver(take: Take) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A handler for connections: a window is acknowledged once TAKE has returned, and until then the client is told to wait."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = subject(writer.get_extra_info("peercert") or {})
        taken: asyncio.Future[None] | None = None
        try:
            async for last, events in windows(reader):
                taken = asyncio.ensure_future(take(events, name))
                while not (await asyncio.wait([taken], timeout=KEEPALIVE_SECONDS))[0]:
                    writer.write(acknowledgement(0))
                    await writer.drain()
                await taken
                writer.write(acknowledgement(last))
                await writer.drain()
        except Refused as problem:
            print(f"{name}: {problem}", flush=True)
        except OSError as problem:
            print(f"{name}: {problem}", flush=True)
        finally:
            if taken:
                taken.cancel()
            writer.close()

    return handle
