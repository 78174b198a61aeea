"""Sealed folders, in which every change is detected.

`manifest.json` has the size of each file and the sha256 of each 64 MiB piece of it; `manifest.hmac` is the HMAC-SHA256 of
the manifest under the estate's key. Pieces let all cores hash one large file; a file of one piece has the hash that
sha256sum prints.

Files may be pickles, which run code when they are loaded. So the manifest is authenticated first, then sizes and hashes are
checked, all before any other file is opened. Files could be replaced after that, so folders that other users can write to
are refused.
"""

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmcore.files import flush

MANIFEST, MAC = "manifest.json", "manifest.hmac"
FORMAT = 1
PIECE = 64 << 20  # bytes; a multiple of the read buffer


class NotGood(Exception):
    """A sealed folder is incomplete or altered; the message says how."""


def walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The folder itself and everything in it; raises NotGood for anything but regular files and folders."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotGood(f"{folder.name} is not a folder")
    yield folder, status
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            yield from walk(Path(entry.path))
        elif stat.S_ISREG(status.st_mode):
            yield Path(entry.path), status
        else:
            raise NotGood(f"{entry.name} is neither a regular file nor a folder")


def changeable(status: os.stat_result) -> bool:
    """Whether users other than root and this process's can write to it."""
    return bool(status.st_mode & 0o022) or status.st_uid not in (0, os.geteuid())


def hashes(sizes: dict[Path, int]) -> Iterator[tuple[Path, list[str]]]:
    """The sha256 of each piece of these files, in hex, computed on all cores; an empty file has one piece."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [
            (path, [pool.submit(_hash, path, at) for at in range(0, max(size, 1), PIECE)])
            for path, size in sizes.items()
        ]
        for path, pieces in jobs:
            yield path, [piece.result() for piece in pieces]


def _hash(path: Path, at: int) -> str:
    """The sha256 of the piece at offset `at`, in hex."""
    digest, buffer, remaining = hashlib.sha256(), memoryview(bytearray(1 << 20)), PIECE
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while remaining and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
            remaining -= count
    return digest.hexdigest()


def seal(folder: Path, key: bytes, facts: dict[str, Any]) -> int:
    """Write the manifest, with `facts`, flush everything to disk, and return the total size in bytes.

    Files are hashed while they are flushed, so that CPU and disk work at the same time.
    """
    folders, sizes = [], {}
    for path, status in walk(folder):
        if stat.S_ISDIR(status.st_mode):
            folders.append(path)
            path.chmod(0o700)
        else:
            sizes[path] = status.st_size
            path.chmod(0o600)
    with ThreadPoolExecutor(2) as pool:
        flushed = pool.map(flush, sizes)
        files = {
            str(path.relative_to(folder)): {"size": sizes[path], "sha256": pieces}
            for path, pieces in hashes(sizes)
        }
        list(flushed)  # raises the error of a flush
    content = json.dumps({**facts, "format": FORMAT, "files": files}, indent=1).encode()
    for name, data in ((MANIFEST, content), (MAC, hmac.digest(key, content, "sha256").hex().encode())):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    for path in reversed(folders):
        flush(path)
    return sum(sizes.values())


def authentic(folder: Path, key: bytes) -> dict[str, Any]:
    """The manifest, after its HMAC, the list of files and their sizes were checked; raises NotGood.

    Only the manifest and its HMAC are opened.
    """
    sizes = {}
    for path, status in walk(folder):
        if changeable(status):
            raise NotGood(
                f"{path.name} is writable by others (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})"
            )
        if stat.S_ISREG(status.st_mode):
            sizes[str(path.relative_to(folder))] = status.st_size
    for name in (MANIFEST, MAC):
        if sizes.pop(name, None) is None:
            raise NotGood(f"it has no {name}")
    content = (folder / MANIFEST).read_bytes()
    if not hmac.compare_digest(
        hmac.digest(key, content, "sha256").hex().encode(), (folder / MAC).read_bytes()
    ):
        raise NotGood("its manifest was altered, or authenticated with another key")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["format"] != FORMAT:
        raise NotGood(f"its manifest has format {manifest['format']}, but this program reads {FORMAT}")
    expected: dict[str, int] = {name: file["size"] for name, file in manifest["files"].items()}
    if missing := sorted(expected.keys() - sizes.keys()):
        raise NotGood(f"{missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(sizes.keys() - expected.keys()):
        raise NotGood(f"{extra[0]} is not in its manifest ({len(extra)} in all)")
    for name, size in expected.items():
        if sizes[name] != size:
            raise NotGood(f"{name} has {sizes[name]} bytes, but its manifest says {size}")
    return manifest


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Check the hash of every file against an authentic manifest; raises NotGood."""
    files = {folder / name: file for name, file in manifest["files"].items()}
    for path, digests in hashes({path: file["size"] for path, file in files.items()}):
        for number, (piece, expected) in enumerate(zip(digests, files[path]["sha256"], strict=True)):
            if piece != expected:
                raise NotGood(
                    f"{path.name} was altered: its piece {number} of {len(digests)} has sha256 {piece}, not {expected} "
                    "as its manifest says"
                )
