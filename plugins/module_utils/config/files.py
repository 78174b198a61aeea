"""Replace a file atomically: a reader, also after a power cut, finds either the old or the new one."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import tempfile
from collections.abc import Iterable
from pathlib import Path

PENDING = Path(
    "/run/llmkeep/pending"
)  # one empty file a unit that has to take in changed files; gone at a boot


def mark_pending(units: Iterable[str]) -> None:
    """Mark units that have to read files which are about to change."""
    for unit in units:
        PENDING.mkdir(parents=True, mode=0o755, exist_ok=True)
        (PENDING / unit).touch()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks so that weights of any size fit."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def user_id(name: str) -> int | None:
    """The uid of a user, or None where there is no such user (yet)."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> int | None:
    """The gid of a group, or None where there is no such group (yet)."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def fsync_directory(path: Path) -> None:
    """Make a rename in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_beside(path: Path, content: bytes, uid: int, gid: int, mode: int) -> Path:
    """Write content to a new hidden file in the folder of path, synced, with its final owner and mode."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchown(stream.fileno(), uid, gid)
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise
    return beside


def replace(beside: Path, path: Path) -> None:
    """Put a file written by write_beside in its place; a symlink there is replaced, not followed."""
    beside.replace(path)
    fsync_directory(path.parent)


def write_file(path: Path, content: bytes, uid: int, gid: int, mode: int) -> None:
    """Write and replace in one step."""
    replace(write_beside(path, content, uid, gid, mode), path)


def link(path: Path, target: str) -> None:
    """Point a symlink at target by one rename: there is no moment without it."""
    beside = path.parent / f".{path.name}.{os.getpid()}.new"
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    beside.symlink_to(target)
    replace(beside, path)
