"""Layers as archives: the same files give the same bytes, on any builder and at any time."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmkeep.errors import LlmkeepError

LEVEL = 6
PERMISSIONS = 0o1777  # without setuid and setgid
READ = 1 << 20


@dataclass(frozen=True)
class Layer:
    """A layer's blob. `digest` is of the compressed archive, `diff_id` of the archive, both `sha256:…`; `size` in bytes."""

    name: str
    digest: str
    size: int
    diff_id: str


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes, /) -> object: ...


class Hashed(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self, file: Writable) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self.hash.hexdigest()}"


def write(name: str, tree: Path, out: Path, epoch: int) -> Layer:
    """Pack TREE as OUT, sorted by path, with owners as numbers and no setuid bit; times after EPOCH become EPOCH."""
    links: dict[tuple[int, int], str] = {}
    with out.open("wb") as file:
        blob = Hashed(file)
        with gzip.GzipFile("", "wb", LEVEL, blob, mtime=0) as packed:
            content = Hashed(packed)
            with tarfile.open(fileobj=content, mode="w|", format=tarfile.PAX_FORMAT, bufsize=READ) as archive:
                for path in _paths(tree):
                    _add(archive, tree / path, path, epoch, links)
    return Layer(name, blob.digest, blob.size, content.digest)


def _paths(tree: Path, below: str = "") -> Iterator[str]:
    """Each path below TREE, a folder before its content."""
    for entry in sorted(os.scandir(tree / below), key=lambda entry: os.fsencode(entry.name)):
        path = f"{below}{entry.name}"
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _paths(tree, f"{path}/")


def _add(
    archive: tarfile.TarFile, file: Path, path: str, epoch: int, links: dict[tuple[int, int], str]
) -> None:
    status = file.lstat()
    info = tarfile.TarInfo(path)
    info.mode = stat.S_IMODE(status.st_mode) & PERMISSIONS
    info.uid, info.gid, info.mtime = status.st_uid, status.st_gid, min(int(status.st_mtime), epoch)
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, str(file.readlink())
    elif not stat.S_ISREG(status.st_mode):
        raise LlmkeepError(
            f"{file} is a device, a socket or a pipe: which a layer must not contain; report this"
        )
    elif status.st_nlink > 1 and (first := links.setdefault((status.st_dev, status.st_ino), path)) != path:
        info.type, info.linkname = tarfile.LNKTYPE, first
    else:
        info.size = status.st_size
        with file.open("rb") as content:
            archive.addfile(info, content)
        return
    archive.addfile(info)


def unpacked(blob: Path) -> str:
    """The diff id of a layer's blob."""
    digest = hashlib.sha256()
    with gzip.open(blob) as content:
        while block := content.read(READ):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
