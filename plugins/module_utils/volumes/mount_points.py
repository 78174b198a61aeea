"""The folder that a volume is mounted on: while the volume is closed it is empty, and nothing can be written into it."""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import tempfile
from pathlib import Path

NEW_MOUNTS, BIND, PRIVATE, RECURSIVE, DETACH = 0x00020000, 4096, 1 << 18, 16384, 2
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10
LIBC = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """A folder cannot be a mount point; the message says why and what to do."""


def must(done: int, doing: str) -> None:
    if done != 0:
        raise Refused(f"{doing}: {os.strerror(ctypes.get_errno())}")


def alone() -> None:
    """Give this process a mount namespace of its own: no other process sees its mounts."""
    must(LIBC.unshare(NEW_MOUNTS), "leave the host's mounts")
    must(LIBC.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None), "keep mounts to this process")


def below(path: Path, folder: Path) -> Path:
    """The folder as it is below its mount: the file system that its parent is on, seen once more at FOLDER."""
    root = path.parent
    while not root.exists():
        root = root.parent
    while not root.is_mount():
        root = root.parent
    must(LIBC.mount(bytes(root), bytes(folder), None, BIND, None), f"look below {path}")
    return folder / path.relative_to(root)


def flags(descriptor: int) -> int:
    held = array.array("L", [0])
    fcntl.ioctl(descriptor, GET_FLAGS, held, True)
    return held[0]


def settle(path: Path, check: bool) -> list[str]:
    """Make, look, protect; what was or would be done."""
    changes = []
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir="/run") as name:
        bare = below(path, Path(name))
        try:
            if not bare.exists():
                changes.append(f"{path}: made")
                if not check:
                    bare.mkdir(parents=True, mode=0o755)
            held = sorted(entry.name for entry in bare.iterdir()) if bare.exists() else []
            if held:
                raise Refused(
                    f"{path} holds {', '.join(held[:5])} on the disk below, which a mounted volume would hide. Move it"
                    " away, run again, and move it into the volume"
                )
            if bare.exists():
                descriptor = os.open(bare, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    seen = flags(descriptor)
                    if not seen & IMMUTABLE:
                        changes.append(f"{path}: immutable where nothing is mounted")
                        if not check:
                            fcntl.ioctl(descriptor, SET_FLAGS, array.array("L", [seen | IMMUTABLE]))
                finally:
                    os.close(descriptor)
        finally:
            LIBC.umount2(name.encode(), DETACH)
    return changes
