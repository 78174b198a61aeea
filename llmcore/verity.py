"""fs-verity: where the kernel checks each page of a file that it reads from the disk, the content needs no hashing.

The role that installs a model has the kernel check its files, and records their digests beside the folder, in NAME.fsverity:
SHA-256 of the content, fs-verity digest, path. https://docs.kernel.org/filesystems/fsverity.html
"""

import fcntl
import struct
from collections.abc import Mapping
from pathlib import Path

MEASURE = 0xC0046686  # FS_IOC_MEASURE_VERITY
DIGEST_BYTES = 64
BLOCK = 1 << 20


def measured(path: Path) -> str:
    """The file's fs-verity digest in hex; empty if the kernel does not check it."""
    buffer = bytearray(struct.pack("=HH", 0, DIGEST_BYTES) + bytes(DIGEST_BYTES))
    with path.open("rb") as file:
        try:
            fcntl.ioctl(file.fileno(), MEASURE, buffer)
        except OSError:
            return ""
    [_, size] = struct.unpack_from("=HH", buffer)
    return buffer[4 : 4 + size].hex()


def recorded(directory: Path) -> Mapping[str, tuple[str, str]]:
    """SHA-256 and fs-verity digest of a model's files by path, as installed; empty if there is no record."""
    try:
        content = directory.with_name(f"{directory.name}.fsverity").read_bytes()
    except OSError:
        return {}
    lines = [line.split("  ", 2) for line in content.decode(errors="replace").splitlines()]
    return {line[2]: (line[0], line[1]) for line in lines if len(line) == 3}


def read(path: Path) -> None:
    """Read all of a file, for the kernel to check it; raises OSError if what the disk gives is not what was installed."""
    with path.open("rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while file.readinto(block):
            pass
