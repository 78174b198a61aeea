"""What this machine must have before a lab starts on it: root, programs, memory, room, and one setting of its kernel."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lab import image, kernel
from lab.errors import MissingProgram, NoMemory, NoSpace, NotRoot
from lab.host import Machine

PROGRAMS = {
    "linux.uml": "user-mode-linux",  # its configuration
    "uml_mconsole": "uml-utilities",
    "gcc-14": "gcc-14",
    "make": "make",
    "patch": "patch",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "nsenter": "util-linux",
    "sysctl": "procps",
    "systemctl": "systemd",
    "ssh": "openssh-client",
}
MEMINFO = Path("/proc/meminfo")
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
MAPPINGS = 1048576  # of memory that one process may have
IMAGE_SPACE = 3 << 30  # bytes needed to build the base image, or the kernel beside it
HOST_SPACE = 4 << 30  # bytes that one more host will need once it serves


def require_root() -> None:
    """NotRoot for everyone else."""
    if os.geteuid() != 0:
        raise NotRoot(f"the lab makes namespaces and taps: run it as root (user id seen: {os.geteuid()})")


def allow_mappings() -> None:
    """A guest's process with libraries like torch's needs more mappings than the kernel's old default allows.

    The value is systemd's own on Debian 13; a machine without systemd still has 65530, and there such a
    process dies with "UML ran out of memory on the host side".
    """
    current = int(MAX_MAP_COUNT.read_text(encoding="ascii"))
    if current < MAPPINGS:
        MAX_MAP_COUNT.write_text(str(MAPPINGS), encoding="ascii")


def require_programs() -> None:
    """MissingProgram with the packages to install."""
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        raise MissingProgram(f"not installed: {', '.join(missing)}; run apt-get install {' '.join(missing)}")


def require_memory(machines: Sequence[Machine]) -> None:
    """NoMemory where the hosts' memory exceeds what is available now."""
    needed = sum(machine.host.memory for machine in machines)
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    if needed > available:
        names = ", ".join(machine.host.name for machine in machines)
        raise NoMemory(
            f"{names} need {needed >> 20} MiB of memory, {available >> 20} MiB are available: "
            "stop something, or lower lab_memory in the inventory"
        )


def require_space(folder: Path, machines: Sequence[Machine]) -> None:
    """NoSpace where disks that are still to be made would not fit."""
    cache = image.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    new = sum(1 for machine in machines if not machine.root.exists())
    wanted: list[tuple[Path, int]] = [(folder, new * HOST_SPACE)]
    if not image.base_image_path().exists() or not kernel.folder(cache).exists():
        wanted.append((cache, IMAGE_SPACE))
    for place, needed in wanted:
        free = shutil.disk_usage(place).free
        if needed > free:
            raise NoSpace(
                f"{place} needs {needed >> 20} MiB, {free >> 20} MiB are free: make room, or move "
                "the checkout (disks) or XDG_CACHE_HOME (base images)"
            )
