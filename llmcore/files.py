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


def size(path: Path) -> int:
    """Bytes of a file; 0 if it was removed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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


def aside_of(path: Path) -> Path:
    """Where the new file is written; a killed writer leaves it there."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` for the new file, which then replaces it atomically and durably. If the block raises, `path`
    is unchanged."""
    aside = aside_of(path)
    yield aside
    flush(aside)
    aside.replace(path)
    flush(path.parent.resolve())


def write_aside(path: Path, content: str | bytes, mode: int | None = None) -> None:
    """Replace a file atomically and durably. Its mode is what the umask leaves if none is given."""
    with replacing(path) as aside:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(aside, flags, 0o666 if mode is None else 0o600), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content.encode() if isinstance(content, str) else content)


def append(path: Path, data: bytes) -> None:
    """Append to a file durably."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    flush(path.parent.resolve())
