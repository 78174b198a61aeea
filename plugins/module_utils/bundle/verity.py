"""fs-verity: the kernel hashes a file once, makes its content immutable, and checks each page that it reads from the disk.

To the reader an altered page is an I/O error (https://docs.kernel.org/filesystems/fsverity.html). Beside a folder of weights,
NAME.fsverity records for each file the SHA-256 of its content, its fs-verity digest, and its path in the folder.

Also the program of the roles' checks, so it imports nothing of the collection: `verity.py FOLDER DEEP MODEL…` compares models
below FOLDER with their SHA256SUMS. Files with a recorded fs-verity digest are not read unless DEEP is `true`. Exit code 1 if
one differs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# linux/fsverity.h; numbers are those of every architecture that Debian has.
ENABLE, MEASURE = 0x40806685, 0xC0046686  # FS_IOC_ENABLE_VERITY, FS_IOC_MEASURE_VERITY
VERSION, SHA256, SALT_BYTES, BLOCK, DIGEST_BYTES = 1, 1, 0, 4096, 64
# The kernel has no fs-verity, or the file system has none, or it was made without.
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY}
SUMS = "SHA256SUMS"
WAY_OUT = "run `llmkeep site -e weights_deep=true`, which fetches it again; if it stays, look at the disk"


class Altered(Exception):
    """A file differs from what was signed; the message names it and says what to do."""

    def __init__(self, path: Path, words: str) -> None:
        super().__init__(f"{path} {words}; {WAY_OUT}")
        self.path = path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as stream:
        yield stream


def measured(path: Path) -> str | None:
    """The file's fs-verity digest in hex; '' if the kernel does not check it, None if this file system cannot."""
    with _opened(path) as stream:
        return _digest(stream)


def _digest(stream: io.FileIO) -> str | None:
    buffer = bytearray(struct.pack("=HH", 0, DIGEST_BYTES) + bytes(DIGEST_BYTES))
    try:
        fcntl.ioctl(stream.fileno(), MEASURE, buffer)
    except OSError as problem:
        if problem.errno == errno.ENODATA:
            return ""
        if problem.errno in UNSUPPORTED:
            return None
        raise
    [_, size] = struct.unpack_from("=HH", buffer)
    return buffer[4 : 4 + size].hex()


def seal(path: Path, sha256: str) -> str | None:
    """Have the kernel check the file from now on; returns its fs-verity digest, None if this file system cannot.

    The content is hashed once it is immutable, and read from the disk for that: the digest stands for what has this SHA-256.
    Raises Altered if it has another one. From then on the file can be removed, not written to.
    """
    with _opened(path) as stream:
        block = min(BLOCK, os.fstatvfs(stream.fileno()).f_bsize)
        argument = struct.pack("=4IQ2IQ88x", VERSION, SHA256, block, SALT_BYTES, 0, 0, 0, 0)
        try:
            fcntl.ioctl(stream.fileno(), ENABLE, argument)
        except OSError as problem:
            if problem.errno in UNSUPPORTED:
                return None
            if problem.errno != errno.EEXIST:  # a run that was interrupted here
                raise OSError(problem.errno, f"fs-verity: {problem.strerror}", str(path)) from None
        _forget_cached(stream)  # pages that were cached before are not checked
        _compare(path, stream, sha256)
        return _digest(stream)


def _forget_cached(stream: io.FileIO) -> None:
    """Have what is read next come from the disk, but for what a process has mapped into its memory."""
    os.fsync(stream.fileno())
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_on_disk(path: Path, sha256: str) -> bool:
    """Whether the file can be read from the disk, and has this SHA-256."""
    with _opened(path) as stream:
        _forget_cached(stream)
        try:
            _compare(path, stream, sha256)
        except Altered:
            return False
    return True


def _compare(path: Path, stream: io.FileIO, sha256: str) -> None:
    try:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as problem:
        raise Altered(path, f"cannot be read: {problem.strerror}") from None
    if actual != sha256:
        raise Altered(path, f"has sha256 {actual}, but the signed manifest says {sha256}")


def record_of(folder: Path) -> Path:
    """Where the digests of a folder's files are recorded: beside it, since it holds what was signed alone."""
    return folder.parent / f"{folder.name}.fsverity"


def recorded(record: Path) -> dict[str, tuple[str, str]]:
    """SHA-256 and fs-verity digest of each file in a record; none where there is no record."""
    try:
        lines = [line.split("  ", 2) for line in record.read_text(errors="replace").splitlines()]
    except FileNotFoundError:
        return {}
    return {line[2]: (line[0], line[1]) for line in lines if len(line) == 3}


def is_sealed(folder: Path, sums: Mapping[str, str], record: Path) -> bool:
    """Whether the kernel checks each file by the digest that is on record for its SHA-256, or cannot on this file system."""
    known = recorded(record)
    digests = {name: measured(folder / name) for name in sums}
    return all(digest is None or known.get(name) == (sums[name], digest) for name, digest in digests.items())


def seal_all(folder: Path, sums: Mapping[str, str], known: Mapping[str, tuple[str, str]]) -> str:
    """Seal files, given by path with their SHA-256, but for those that are as known; returns the text of their record.

    That is '' where the file system has no fs-verity. Raises Altered at the first file with another content.
    """
    lines = []
    for name, sha256 in sorted(sums.items()):
        digest = measured(folder / name)
        if digest is not None and known.get(name) != (sha256, digest):
            digest = seal(folder / name, sha256)
        if digest is not None:
            lines.append(f"{sha256}  {digest}  {name}\n")
    return "".join(lines)


def verify(folder: Path, deep: bool) -> str:
    """Compare the files with SHA256SUMS and the record; returns in words how. Raises Altered at the first that differs."""
    manifest = (folder / SUMS).read_bytes()
    known = recorded(record_of(folder))
    checked = hashed = 0
    for line in manifest.decode().splitlines():
        sha256, name = line.split("  ", 1)
        with _opened(folder / name) as stream:
            if not deep and known.get(name) == (sha256, _digest(stream)):
                checked += 1
            else:
                if deep:
                    _forget_cached(stream)
                _compare(folder / name, stream, sha256)
                hashed += 1
    if not checked + hashed:
        raise Altered(folder / SUMS, "is empty")
    revision = hashlib.sha256(manifest).hexdigest()[:16]
    return f"{folder.name} {revision}: {checked} files kernel-verified (fs-verity), {hashed} hashed"


def main(folder: str, deep: str, *models: str) -> int:
    try:
        for model in models:
            print(verify(Path(folder, model), deep == "true"))
    except (Altered, OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
