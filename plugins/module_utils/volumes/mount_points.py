"""Mount points of volumes: empty and immutable while the volume is closed."""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import tempfile
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

NEW_MOUNTS, BIND, PRIVATE, RECURSIVE, DETACH = 0x00020000, 4096, 1 << 18, 16384, 2
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10
LIBC = ctypes.CDLL(None, use_errno=True)


def must(done: int, doing: str) -> None:
    if done != 0:
        raise Refused(f"{doing}: {os.strerror(ctypes.get_errno())}")


def alone() -> None:
    """Move this process into its own mount namespace, so that its mounts are private."""
    must(LIBC.unshare(NEW_MOUNTS), "leave the host's mounts")
    must(LIBC.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None), "keep mounts to this process")


def below(path: Path, folder: Path) -> Path:
    """The directory below the mount: its parent's file system, bind-mounted at FOLDER."""
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
    """Create, inspect and protect a mount point; returns the changes that were or would be made."""
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
                    attributes = flags(descriptor)
                    if not attributes & IMMUTABLE:
                        changes.append(f"{path}: immutable where nothing is mounted")
                        if not check:
                            fcntl.ioctl(descriptor, SET_FLAGS, array.array("L", [attributes | IMMUTABLE]))
                finally:
                    os.close(descriptor)
        finally:
            LIBC.umount2(name.encode(), DETACH)
    return changes
