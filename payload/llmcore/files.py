"""Files: detecting replacement, hashing, and writing so that a power cut leaves either the old or the new content."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """A value that changes when the file is replaced or rewritten; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` for the new file, which then replaces it atomically and durably. If the block raises, `path`
    is unchanged."""
    aside = path.with_name(path.name + ".partial")
    yield aside
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def write_aside(path: Path, text: str) -> None:
    """Replace a text file atomically and durably."""
    with replacing(path) as aside:
        aside.write_text(text)
