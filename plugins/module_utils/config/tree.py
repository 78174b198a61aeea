"""Bring directories, files and links to their wanted state one by one, so that all of them can be restored."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

VALIDATE_SECONDS = 300  # vLLM's parser imports all of vLLM, from a cold disk


@dataclass
class Tree:
    """The tree as wanted, and what applying it did so far."""

    check: bool
    changes: list[str] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.changes.append(line)

    def owner(self, user: str, group: str) -> tuple[int, int]:
        """(uid, gid); (-1, -1), which no file has, in check mode before what makes them is there."""
        uid, gid = atomic.user_id(user), atomic.group_id(group)
        if uid is None or gid is None:
            if self.check:
                return -1, -1
            missing = f"user {user!r}" if uid is None else f"group {group!r}"
            raise Refused(
                f"{missing} does not exist on this host; install its package or name it in sysusers first"
            )
        return uid, gid

    def put_back(self) -> None:
        for step in reversed(self.undo):
            step()


def run(argv: list[str], doing: str) -> None:
    """Run a validator; Refused, with its output, if it fails, is absent, or hangs."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VALIDATE_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise Refused(
            f"{doing}: {argv[0]} is not installed on this host; install its package first"
        ) from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{doing}: {' '.join(argv)} did not end within {VALIDATE_SECONDS} s") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message")[-2000:]
        raise Refused(f"{doing}: {' '.join(argv)} ended with {done.returncode}: {words}")


def same_attributes(status: os.stat_result, owner: tuple[int, int], mode: int) -> bool:
    return owner == (status.st_uid, status.st_gid) and stat.S_IMODE(status.st_mode) == mode


def put_directory(tree: Tree, entry: dict[str, Any]) -> None:
    path, mode = Path(entry["path"]), int(entry["mode"], 8)
    owner = tree.owner(entry["owner"], entry["group"])
    status = atomic.status_of(path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise Refused(
            f"{path} must be a directory, but is a file or link; examine it, and move it away by hand"
        )
    if status is None:
        tree.note(f"directory: {path} made")
        if tree.check:
            return
        atomic.make_directory(path, 0o700)
        tree.undo.append(lambda: atomic.remove(path))
    elif same_attributes(status, owner, mode):
        return
    else:
        tree.note(
            f"directory: {path} from {stat.S_IMODE(status.st_mode):04o} {status.st_uid}:{status.st_gid}"
            f" to {mode:04o} {entry['owner']}:{entry['group']}"
        )
        if tree.check:
            return
        old = status
        tree.undo.append(
            lambda: atomic.set_attributes(path, old.st_uid, old.st_gid, stat.S_IMODE(old.st_mode))
        )
    atomic.set_attributes(path, *owner, mode)


def remember(path: Path) -> Callable[[], None]:
    """A function that restores the current state of a path: a file, a link, or nothing."""
    status = atomic.status_of(path)
    if status is None:
        return lambda: forget(path)
    if stat.S_ISLNK(status.st_mode):
        target = str(path.readlink())
        return lambda: atomic.link(path, target)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(
            f"{path} must be a file or link, but is something else; examine it, and move it away by hand"
        )
    content = atomic.read(path)
    return lambda: atomic.write_file(
        path, content, status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)
    )


def forget(path: Path) -> None:
    """Remove what was made, where it was made."""
    with contextlib.suppress(FileNotFoundError):
        atomic.remove(path)


def stage(
    tree: Tree, wanted_files: list[tuple[dict[str, Any], str | None]], units: Sequence[str] = ()
) -> None:
    """Write every changed file beside its destination, validate each, and only then replace them one by one."""
    staged: list[tuple[Path, Path]] = []
    try:
        for entry, secret in wanted_files:
            beside = prepare_file(tree, entry, secret)
            if beside is not None:
                staged.append((beside, Path(entry["dest"])))
                if entry.get("validate"):
                    run([word.replace("%s", str(beside)) for word in entry["validate"]], entry["dest"])
        if staged:
            atomic.mark_pending(units)
        for beside, path in staged:
            tree.undo.append(remember(path))
            atomic.replace(beside, path)
    finally:
        for beside, _ in staged:
            forget(beside)


def prepare_file(tree: Tree, entry: dict[str, Any], secret: str | None) -> Path | None:
    """The new file, written beside its destination; None if nothing changes or in check mode."""
    path, mode = Path(entry["dest"]), int(entry["mode"], 8)
    content = (secret if secret is not None else entry.get("content") or "").encode()
    owner = tree.owner(entry["owner"], entry["group"])
    status = atomic.status_of(path)
    old = None
    if status is not None:
        if stat.S_ISREG(status.st_mode):
            old = atomic.read(path)
        elif not stat.S_ISLNK(status.st_mode):
            raise Refused(
                f"{path} must be a file, but is a directory or device; examine it, and move it away by hand"
            )
    if entry.get("block"):
        content = with_block(old or b"", entry["block"], content)
    if status is not None and old == content and same_attributes(status, owner, mode):
        return None
    tree.note(f"file: {path} {describe(old, content, status)}")
    if entry.get("secret") or secret is not None:
        tree.before[str(path)] = tree.after[str(path)] = "(secret: not shown)\n"
    else:
        tree.before[str(path)] = (old or b"").decode(errors="replace")
        tree.after[str(path)] = content.decode(errors="replace")
    if tree.check:
        return None
    if not path.parent.is_dir():
        raise Refused(
            f"{path.parent} is not a directory; name it in directories, or install the package that creates it"
        )
    return Path(atomic.write_beside(path, content, *owner, mode))


def with_block(old: bytes, name: str, content: bytes) -> bytes:
    """A file with its block replaced, or added at the end; without content there is none."""
    begin, end = f"# BEGIN {name}\n".encode(), f"# END {name}\n".encode()
    block = begin + content.rstrip(b"\n") + b"\n" + end if content.strip() else b""
    head, marker, tail = old.partition(begin)
    if marker:
        return head + block + tail.partition(end)[2]
    if block and head and not head.endswith(b"\n"):
        head += b"\n"
    return head + block


def describe(old: bytes | None, new: bytes, status: os.stat_result | None) -> str:
    if status is None:
        return "made"
    if old is None:
        return "replaces a link"
    return "replaced" if old != new else "owner or mode set"


def put_link(tree: Tree, entry: dict[str, Any]) -> None:
    path, target = Path(entry["path"]), entry["target"]
    if path.is_symlink() and str(path.readlink()) == target:
        return
    tree.note(f"link: {path} -> {target}")
    if tree.check:
        return
    tree.undo.append(remember(path))
    atomic.link(path, target)


def remove(tree: Tree, path: Path) -> None:
    if not path.is_symlink() and not path.exists():
        return
    tree.note(f"removed: {path}")
    if tree.check:
        return
    tree.undo.append(remember(path))
    atomic.remove(path)


def remove_directory(tree: Tree, path: Path) -> None:
    """Remove a directory in which nothing lies any more."""
    if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
        return
    tree.note(f"removed: {path}")
    if tree.check:
        return
    status = path.stat()
    atomic.remove(path)
    tree.undo.append(
        lambda: atomic.set_attributes(path, status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
    )
    tree.undo.append(lambda: atomic.make_directory(path, 0o700))
