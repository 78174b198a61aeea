"""Files that survive a power cut: replaced whole, or appended to as a chain of records."""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmcore.files import flush, write_aside
from llmkeep.errors import LlmkeepError

FORMAT = 1  # of each record and document that llmkeep stores; those without the field are of format 1


def require_format(path: Path, document: object) -> None:
    """LlmkeepError where DOCUMENT, read from PATH, has a newer format: its known fields may mean something else by then.

    A format above 1 names in `bundle` the serial of the bundle that wrote it.
    """
    number = document.get("format", FORMAT) if isinstance(document, dict) else FORMAT
    if isinstance(document, dict) and isinstance(number, int) and number > FORMAT:
        writer = f"bundle serial {document['bundle']}" if "bundle" in document else "a newer bundle"
        raise LlmkeepError(
            f"{path} has format {number}, and this llmkeep reads {FORMAT}: {writer} wrote it. It was left as it is; run "
            "bootstrap from a bundle at least as new"
        )


def write(path: Path, data: bytes, mode: int) -> None:
    """Replace `path` atomically and durably; its folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, data, mode)


@contextmanager
def readable() -> Iterator[None]:
    """Make new files and folders world-readable, whatever the user's umask: hosts, or nginx on their behalf, read them."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


def sync_all(folder: Path) -> None:
    """Wait until FOLDER is on disk, with every file and folder in it."""
    for place, _, names in os.walk(folder):
        for name in names:
            flush(Path(place, name))
        flush(Path(place))


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Create FOLDER, or reuse it after an interrupted run, and lock it as `alone` does.

    Only this user may change new files in it, whatever the umask. LlmkeepError where another user could change what
    is in it, or put another one in its place, and for a link below it: what is written there lies where its name
    says.
    """
    with readable():
        folder.parent.mkdir(parents=True, exist_ok=True)
        for place in (above := folder.parent.resolve(), *above.parents):
            status, owners = place.stat(), {os.geteuid(), 0}
            sticky = status.st_mode & stat.S_ISVTX and status.st_uid in owners
            if not sticky and (whose := _of_others(status, owners)):
                raise LlmkeepError(
                    f"{place} is {whose}, so another user could replace {folder} with their own folder: give another place "
                    "with --into"
                )
        with suppress(FileExistsError):
            folder.mkdir()
        with alone(folder) as descriptor:
            for path, status in _below(folder, descriptor):
                whose = "a link" if stat.S_ISLNK(status.st_mode) else _of_others(status, {os.geteuid()})
                if whose:
                    raise LlmkeepError(f"{path} is {whose}: find out who created {folder}, and remove it")
            yield


def _of_others(status: os.stat_result, owners: set[int]) -> str:
    """By what a user that is none of OWNERS may change the file, or what is in the folder; "" where none may."""
    if status.st_uid not in owners:
        return f"owned by user {status.st_uid}"
    return f"accessible to others by its mode {status.st_mode & 0o7777:04o}" if status.st_mode & 0o022 else ""


def _below(folder: Path, descriptor: int) -> Iterator[tuple[Path, os.stat_result]]:
    """The folder of DESCRIPTOR, and everything in it."""
    yield folder, os.fstat(descriptor)
    for place, folders, names, opened in os.fwalk(".", dir_fd=descriptor):
        for name in (*folders, *names):
            yield folder / place / name, os.stat(name, dir_fd=opened, follow_symlinks=False)


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Lock a folder by the descriptor that is yielded. The lock is released when its process ends, for whatever reason."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise LlmkeepError(f"{folder} is not a folder, or is a symbolic link: remove it") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LlmkeepError(f"another llmkeep is using {folder}: wait until it has finished") from error
        yield descriptor
    finally:
        os.close(descriptor)


def record(path: Path, entry: dict[str, object]) -> None:
    """Append ENTRY, chained to the line before it by hash, and wait until it is on disk.

    LlmkeepError, and nothing is appended, where a line has a newer format.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read()
        _entries(path, whole)
        if whole and not whole.endswith(b"\n"):
            # A power cut tore the last line: end it, so that it stays recognizable.
            file.write(b"\n")
            whole += b"\n"
        last = whole.splitlines()[-1] if whole else b""
        chained = {**entry, "format": FORMAT, "previous": hashlib.sha256(last).hexdigest()}
        line = json.dumps(chained, sort_keys=True)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    flush(path.parent)


def recorded(path: Path) -> list[dict[str, Any]]:
    """The entries of a record, oldest first, without lines that a power cut tore. LlmkeepError where one has a newer format."""
    return _entries(path, path.read_bytes() if path.exists() else b"")


def _entries(path: Path, whole: bytes) -> list[dict[str, Any]]:
    entries = []
    for line in whole.splitlines():
        try:
            entry = dict(json.loads(line))
        except (ValueError, TypeError):
            continue
        require_format(path, entry)
        entries.append(entry)
    return entries


def broken_at(path: Path) -> int | None:
    """The first line (from 1) whose hash of the line before does not hold; None when the chain is whole.

    LlmkeepError where a line has a newer format.
    """
    last = b""
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            entry = json.loads(line)
            require_format(path, entry)
            if entry["previous"] != hashlib.sha256(last).hexdigest():
                return number
        except (ValueError, KeyError, TypeError):
            # A torn line is no record; the next one is chained to it all the same.
            pass
        last = line
    return None
