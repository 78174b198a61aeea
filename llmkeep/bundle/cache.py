"""The builder's download cache: files from the registries' own clients, addressed by content."""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkeep.errors import LlmkeepError


def home() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/llmkeep, created if necessary."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "llmkeep"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def alone(part: str = "") -> Iterator[None]:
    """Lock the cache, or one part of it. The lock is released when its process ends, for whatever reason."""
    with (home() / f"{part}lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                "another llmkeep of this user is filling the cache; waiting for it",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blob(digest: str) -> Path:
    """Path of the file with this sha256, which may not exist yet."""
    folder = home() / "sha256"
    folder.mkdir(exist_ok=True)
    return folder / digest


def put(path: Path) -> str:
    """Move a finished download into the cache; returns its sha256."""
    digest = sha256(path)
    place = blob(digest)
    if place.exists():
        path.unlink()
    else:
        path.chmod(0o444)
        path.replace(place)
    return digest


def intact(digest: str) -> Path:
    """The cached file, after it was hashed again. Raises LlmkeepError, and removes the file, if it changed."""
    place = blob(digest)
    if (actual := sha256(place)) != digest:
        place.unlink()
        raise LlmkeepError(
            f"the cached {place} has sha256 {actual}: it was damaged and has been removed; run it again"
        )
    return place


def has(digest: str, size: int) -> bool:
    """Whether the complete file is cached. A file of another size is truncated, and is removed."""
    place = blob(digest)
    if not place.exists():
        return False
    if place.stat().st_size != size:
        place.unlink()
        return False
    return True


def place(source: Path, path: Path) -> None:
    """Put a cached file at `path`: a hard link where the file system allows it, else a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, path)
