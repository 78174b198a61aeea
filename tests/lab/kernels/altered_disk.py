"""A disk that gives other bytes than were written, below file system and LUKS, and who reads them. Runs as root on a host.

flip FILE OFFSET     flip a bit of the file on the disk; a second time makes it as it was
page-out FILE PID    have the process read its mapping of the file from the disk again, as if memory had been short
"""

import ctypes
import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

FIBMAP, PROCESS_MADVISE, MADV_PAGEOUT = 1, 440, 21


def place(file: Path, offset: int) -> tuple[Path, int]:
    """The disk and the byte's offset there, of a file on an ext4 on a LUKS volume."""
    with file.open("rb") as stream:
        size = os.fstatvfs(stream.fileno()).f_bsize
        [block] = struct.unpack("i", fcntl.ioctl(stream.fileno(), FIBMAP, struct.pack("i", offset // size)))
        device = os.fstat(stream.fileno()).st_dev
    argv = ["dmsetup", "table", "--major", str(os.major(device)), "--minor", str(os.minor(device))]
    # START LENGTH crypt CIPHER KEY IV DEVICE OFFSET …
    table = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    return Path("/dev/block", table[6]), int(table[7]) * 512 + block * size + offset % size


def flip(file: Path, offset: int) -> None:
    disk, at = place(file, offset)
    with disk.open("r+b", buffering=0) as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
        os.fsync(stream.fileno())
    Path("/proc/sys/vm/drop_caches").write_text("3")


def page_out(file: Path, process: int) -> None:
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    [mapping] = [line.split()[0] for line in lines if line.endswith(f" {file}")]
    start, end = (int(word, 16) for word in mapping.split("-"))
    vector = struct.pack("=QQ", start, end - start)
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.syscall(PROCESS_MADVISE, os.pidfd_open(process), vector, 1, MADV_PAGEOUT, 0)
    if done != end - start:
        raise OSError(ctypes.get_errno(), f"{done} of {end - start} bytes were paged out")


if __name__ == "__main__":
    {"flip": flip, "page-out": page_out}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
