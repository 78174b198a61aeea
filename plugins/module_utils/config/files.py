"""Replace a file atomically: a reader, also after a power cut, finds either the old or the new one.

Root works through descriptors of directories that only root can change. By a path, a service that owns one of its
directories could put a link there between a look and a change, and have root open any file for it.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import os
import pwd
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

PENDING = Path(
    "/run/llmkeep/pending"
)  # one empty file a unit that has to take in changed files; gone at a boot
MOST_LINKS = 40  # on the way to a directory, as Linux has it


class Unsafe(OSError):
    """A user other than root could change what the path refers to."""


@contextlib.contextmanager
def folder(path: Path) -> Iterator[int]:
    """The descriptor of a directory. Raises Unsafe if it, or one above it, can be changed by anyone but root."""
    descriptor = _open_folder(Path.cwd() / path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_folder(path: Path, links: int = 0) -> int:
    here = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number, name in enumerate(path.parts[1:], start=1):
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                if not _is_roots(status):
                    raise Unsafe(
                        errno.EPERM, f"a link of uid {status.st_uid}", str(Path(*path.parts[: number + 1]))
                    )
                if links == MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                target = Path(*path.parts[:number], os.readlink(name, dir_fd=here), *path.parts[number + 1 :])
                os.close(here)
                here = -1
                return _open_folder(target, links + 1)
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
            status = os.fstat(here)
            shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
            if shared or not _is_roots(status):
                raise Unsafe(
                    errno.EPERM,
                    f"uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o} could change its content, so root "
                    "changes nothing below it: give it to root, mode 0755 or less",
                    str(Path(*path.parts[: number + 1])),
                )
    except BaseException:
        if here >= 0:
            os.close(here)
        raise
    return here


def _is_roots(status: os.stat_result) -> bool:
    return status.st_uid in {0, os.geteuid()}


def status_of(path: Path) -> os.stat_result | None:
    """What is at a path, links not followed; None where nothing is."""
    try:
        with folder(path.parent) as parent:
            return os.stat(path.name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def read(path: Path) -> bytes:
    """The content of a regular file; raises OSError for anything else, a link included."""
    with folder(path.parent) as parent:
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return stream.read()


def set_attributes(path: Path, uid: int, gid: int, mode: int) -> None:
    """Owner and mode of a directory or regular file, never of what a link points at."""
    with folder(path.parent) as parent:
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    try:
        os.fchown(descriptor, uid, gid)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


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
    """The uid of a user, or None if there is no such user (yet)."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> int | None:
    """The gid of a group, or None if there is no such group (yet)."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def fsync_directory(path: Path) -> None:
    """Make a rename in a directory durable."""
    with folder(path) as descriptor:
        os.fsync(descriptor)


def write_beside(path: Path, content: bytes, uid: int, gid: int, mode: int) -> Path:
    """Write content to a new hidden file in the folder of path, synced, with its final owner and mode."""
    name = f".{path.name}.{uuid.uuid4().hex[:8]}.new"
    with folder(path.parent) as parent:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                os.fchown(descriptor, uid, gid)
                os.fchmod(descriptor, mode)
                stream.write(content)
                stream.flush()
                os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            raise
    return path.parent / name


def replace(beside: Path, path: Path) -> None:
    """Put a file of the same folder in its place; a symlink there is replaced, not followed."""
    with folder(path.parent) as parent:
        os.replace(beside.name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)


def write_file(path: Path, content: bytes, uid: int, gid: int, mode: int) -> None:
    """Write and replace in one step."""
    replace(write_beside(path, content, uid, gid, mode), path)


def link(path: Path, target: str) -> None:
    """Point a symlink at target by one rename, so that it always exists."""
    beside = path.parent / f".{path.name}.{os.getpid()}.new"
    with folder(path.parent) as parent:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside.name, dir_fd=parent)
        os.symlink(target, beside.name, dir_fd=parent)
    replace(beside, path)


def remove(path: Path) -> None:
    """Remove a file or link, or an empty directory, durably."""
    with folder(path.parent) as parent:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.rmdir(path.name, dir_fd=parent)
        else:
            os.unlink(path.name, dir_fd=parent)
        os.fsync(parent)


def make_directories(path: Path, mode: int) -> None:
    """Make a directory and those above it that are missing; raises Unsafe where one of them is not root's."""
    if status_of(path) is None:
        make_directories(path.parent, mode)
        make_directory(path, mode)
    with folder(path):
        pass


def is_safe(path: Path) -> bool:
    """Whether a directory is there, and only root can change what is in it."""
    try:
        with folder(path):
            return True
    except OSError:
        return False


def make_directory(path: Path, mode: int) -> None:
    """Make a directory in one that is there."""
    with folder(path.parent) as parent:
        os.mkdir(path.name, mode, dir_fd=parent)
