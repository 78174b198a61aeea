"""A stand-in for a kernel and file system with fs-verity, for tests on machines that have none.

It answers the two ioctls as the kernel does. Contents do not become immutable, and reads are not checked: what that gives is
tested on a real kernel, in tests/lab/kernels/test_encrypted_estate.py.
"""

import errno
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

ENABLE, MEASURE = 0x40806685, 0xC0046686


class KernelWithVerity:
    """Digests by inode, and the files that were enabled, in order."""

    def __init__(self) -> None:
        self.digests: dict[int, bytes] = {}
        self.enabled: list[str] = []

    def ioctl(self, descriptor: int, request: int, argument: Any) -> int:
        inode, path = os.fstat(descriptor).st_ino, Path(f"/proc/self/fd/{descriptor}").readlink()
        if request == ENABLE:
            version, algorithm, block = struct.unpack_from("=3I", argument)
            assert (version, algorithm, block, len(argument)) == (1, 1, 4096, 128)
            if inode in self.digests:
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            self.digests[inode] = hashlib.sha256(b"verity" + path.read_bytes()).digest()
            self.enabled.append(path.name)
        else:
            assert request == MEASURE
            if inode not in self.digests:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            struct.pack_into("=HH32s", argument, 0, 1, 32, self.digests[inode])
        return 0
