"""A folder of files that nobody can change unseen: each file's size and sha256 stand in `manifest.json`, and
`manifest.hmac` is the HMAC-SHA256 of that file under the estate's key.

What is read from such a folder may be a pickle, which runs code when it is loaded. So the manifest is authenticated
first, then sizes, then hashes, and all of it before anybody opens a file; and because a file could be put in another's
place after that, folders which somebody else may write to are refused.
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

MANIFEST, MAC = "manifest.json", "manifest.hmac"
FORMAT = 1


class NotGood(Exception):
    """What is wrong with a folder."""


def walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The folder itself and all that is in it; raises NotGood for anything but plain files and folders."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotGood(f"{folder.name} is no folder")
    yield folder, status
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            yield from walk(Path(entry.path))
        elif stat.S_ISREG(status.st_mode):
            yield Path(entry.path), status
        else:
            raise NotGood(f"{entry.name} is neither a plain file nor a folder")


def changeable(status: os.stat_result) -> bool:
    """Whether a user other than this process's and root may write to it."""
    return bool(status.st_mode & 0o022) or status.st_uid not in (0, os.geteuid())


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, key: bytes, facts: dict[str, Any]) -> int:
    """Write the manifest, with `facts`, and bring everything to the disk; the files' bytes.

    Files are hashed while they are flushed: a core works while the disk does.
    """
    entries = list(walk(folder))
    paths = [path for path, status in entries if stat.S_ISREG(status.st_mode)]
    folders = [path for path, status in entries if stat.S_ISDIR(status.st_mode)]
    for path, status in entries:
        path.chmod(0o700 if stat.S_ISDIR(status.st_mode) else 0o600)
    with ThreadPoolExecutor(2) as flushing, ThreadPoolExecutor(os.process_cpu_count()) as hashing:
        flushed, hashes = flushing.map(flush, paths), hashing.map(sha256, paths)
        files = {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, hashes, strict=True)
        }
        list(flushed)  # raises what a flush did
    content = json.dumps({**facts, "format": FORMAT, "files": files}, indent=1).encode()
    for name, data in ((MANIFEST, content), (MAC, hmac.digest(key, content, "sha256").hex().encode())):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    for path in reversed(folders):
        flush(path)
    return sum(status.st_size for _, status in entries if stat.S_ISREG(status.st_mode))


def authentic(folder: Path, key: bytes) -> dict[str, Any]:
    """The manifest, after its HMAC, the list of files and their sizes were found right; raises NotGood.

    No file but the manifest and its HMAC is opened.
    """
    found = {}
    for path, status in walk(folder):
        if changeable(status):
            raise NotGood(
                f"{path.name} can be written by others (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})"
            )
        if stat.S_ISREG(status.st_mode):
            found[str(path.relative_to(folder))] = status.st_size
    for name in (MANIFEST, MAC):
        if found.pop(name, None) is None:
            raise NotGood(f"it has no {name}")
    content = (folder / MANIFEST).read_bytes()
    if not hmac.compare_digest(
        hmac.digest(key, content, "sha256").hex().encode(), (folder / MAC).read_bytes()
    ):
        raise NotGood("its manifest was altered, or authenticated with another key")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["format"] != FORMAT:
        raise NotGood(f"its manifest has format {manifest['format']}, this program reads {FORMAT}")
    wanted: dict[str, int] = {name: file["size"] for name, file in manifest["files"].items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise NotGood(f"{missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys()):
        raise NotGood(f"{extra[0]} is not in its manifest ({len(extra)} in all)")
    for name, size in wanted.items():
        if found[name] != size:
            raise NotGood(f"{name} has {found[name]} bytes, its manifest says {size}")
    return manifest


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Every file has the hash that an authentic manifest says; raises NotGood."""
    wanted = {folder / name: str(file["sha256"]) for name, file in manifest["files"].items()}
    with ThreadPoolExecutor(os.process_cpu_count()) as pool:
        for path, seen in zip(wanted, pool.map(sha256, wanted), strict=True):
            if seen != wanted[path]:
                raise NotGood(f"{path.name} has sha256 {seen}, its manifest says {wanted[path]}")
