"""The log of dm-log-writes: each write of a disk in the order in which flushes made it durable, and marks between them.

Needs root, and a kernel that has dm-log-writes.
"""

import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOGGED = Path("/dev/mapper/logged")
LOG_SIZE = 256 << 20
# Documentation/admin-guide/device-mapper/log-writes.rst: a block for itself, then entries, each in a block before its data.
MAGIC, VERSION = 0x6A736677736872, 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


def tool(*argv: str | Path) -> str:
    return subprocess.run([str(word) for word in argv], check=True, capture_output=True, text=True).stdout


def blank(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)


@contextmanager
def loop(file: Path) -> Iterator[Path]:
    """A loop device over a file."""
    device = Path(tool("losetup", "--find", "--show", file).strip())
    try:
        yield device
    finally:
        tool("udevadm", "settle")
        tool("losetup", "--detach", device)


@contextmanager
def logged(disk: Path, log: Path) -> Iterator[Path]:
    """A device over the file DISK whose every write is kept in LOG, which is made."""
    tool("modprobe", "dm-log-writes")
    blank(log, LOG_SIZE)
    with loop(disk) as device, loop(log) as writes:
        table = f"0 {disk.stat().st_size // 512} log-writes {device} {writes}"
        tool("dmsetup", "create", LOGGED.name, "--table", table)
        tool("udevadm", "settle")
        try:
            yield LOGGED
        finally:
            tool("udevadm", "settle")
            tool("dmsetup", "remove", "--retry", LOGGED.name)  # udev may look at it once more


def mark(name: str) -> None:
    """Say in the log where it is now."""
    tool("dmsetup", "message", LOGGED.name, "0", "mark", name)


def spread[T](every: Sequence[T], count: int, seed: int) -> list[T]:
    """One of each of COUNT equal stretches; all of them if COUNT is 0."""
    if not count:
        return list(every)
    chance, width = random.Random(seed), len(every) / count  # noqa: S311
    return [every[int((stretch + chance.random()) * width)] for stretch in range(count)]


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
