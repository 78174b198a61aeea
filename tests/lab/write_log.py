"""The log of dm-log-writes: each write of a disk in the order in which flushes made it durable, and marks between them."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Documentation/admin-guide/device-mapper/log-writes.rst: a block for itself, then entries, each in a block before its data.
MAGIC, VERSION = 0x6A736677736872, 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


@dataclass(frozen=True)
class Entry:
    """A write of LENGTH bytes at OFFSET of the disk, whose bytes lie AT a place of the log; or a mark."""

    flags: int
    offset: int
    length: int
    at: int
    mark: str


def entries(log: Path) -> list[Entry]:
    """The whole log."""
    found = []
    with log.open("rb") as stream:
        magic, version, count, block = struct.unpack("<QQQI", stream.read(28))
        assert (magic, version) == (MAGIC, VERSION), f"{log} is no log of dm-log-writes: {magic:x} {version}"
        at = block
        for _ in range(count):
            stream.seek(at)
            head = stream.read(block)
            start, blocks, flags, length = struct.unpack_from("<4Q", head)
            mark = head[32 : 32 + length].rstrip(b"\0").decode() if flags & MARK else ""
            found.append(Entry(flags, start * block, blocks * block, at + block, mark))
            at += block + (0 if flags & DISCARD else blocks * block)
    return found


def apply(log: Path, chosen: Sequence[Entry], disk: Path) -> None:
    """Do the writes again."""
    with log.open("rb") as source, disk.open("r+b") as target:
        for entry in chosen:
            source.seek(entry.at)
            content = bytes(entry.length) if entry.flags & DISCARD else source.read(entry.length)
            target.seek(entry.offset)
            target.write(content)
