"""Files: watched for who replaces them, hashed, and written so that a power cut leaves the old one or the new one."""

import hashlib
import os
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """Changes whenever the file is replaced or rewritten; None while it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_aside(path: Path, text: str) -> None:
    """Write a text aside, flush and rename it."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    flush(aside)
    aside.replace(path)
    flush(path.parent)
