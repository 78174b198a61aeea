"""Requirements on this machine: root, programs, memory, disk space, and one kernel setting."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lab import cgroup, image, kernel
from lab.errors import MissingProgram, NoMemory, NoSpace, NotRoot, Unsupported
from lab.machine import Machine

PROGRAMS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "sysctl": "procps",
    "systemctl": "systemd",
    "ssh": "openssh-client",
}
PROGRAMS_OF_KIND = {
    "container": {"systemd-nspawn": "systemd-container"},
    "kernel": {
        "uml_mconsole": "uml-utilities",
        "gcc-14": "gcc-14",
        "make": "make",
        "patch": "patch",
        "flex": "flex",
        "bison": "bison",
        "bc": "bc",
        "mkfs.ext4": "e2fsprogs",
        "debugfs": "e2fsprogs",
        "depmod": "kmod",
    },
}
# What a host of a kind has of its own.
GIVES = {
    "container": ("reboot", "power cut", "firewall", "snapshots"),
    "kernel": (
        "reboot",
        "power cut",
        "firewall",
        "snapshots",
        "disks",
        "device-mapper",
        "swap",
        "clock",
        "modules",
        "ESP",
        "limits",
    ),
}
LIMITS = ("memory", "pids", "cpu")  # of cgroup2, by which a container's services are held
TUN = Path("/dev/net/tun")
MEMINFO = Path("/proc/meminfo")
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
MAPPINGS = 1048576  # of memory that one process may have
IMAGE_SPACE = 3 << 30  # bytes needed to build the base image, or the kernel beside it
HOST_SPACE = 4 << 30  # bytes that one more host will need once it serves


def require_root() -> None:
    """NotRoot if the effective user is not root."""
    if os.geteuid() != 0:
        raise NotRoot(f"the lab makes namespaces and taps: run it as root (user id seen: {os.geteuid()})")


def allow_mappings() -> None:
    """Raise vm.max_map_count: a guest process that loads torch needs more mappings than the old default allows.

    The value is systemd's on Debian 13. Without systemd the kernel's default is 65530, and such a process ends with
    "UML ran out of memory on the host side".
    """
    current = int(MAX_MAP_COUNT.read_text(encoding="ascii"))
    if current < MAPPINGS:
        MAX_MAP_COUNT.write_text(str(MAPPINGS), encoding="ascii")


def require_programs(kinds: Iterable[str]) -> None:
    """MissingProgram with the packages to install."""
    missing = _missing_packages(kinds)
    if missing:
        raise MissingProgram(f"not installed: {', '.join(missing)}; run apt-get install {' '.join(missing)}")


def _missing_packages(kinds: Iterable[str]) -> list[str]:
    programs = dict(PROGRAMS)
    for kind in kinds:
        programs |= PROGRAMS_OF_KIND[kind]
    if not image.tree_path().exists():
        programs["mmdebstrap"] = "mmdebstrap"  # which makes it
    return sorted({package for program, package in programs.items() if shutil.which(program) is None})


def require_kinds(machines: Sequence[Machine], folder: Path) -> None:
    """MissingProgram or Unsupported if this machine cannot run a kind of host in the inventory."""
    kinds = {machine.kind for machine in machines}
    require_programs(kinds)
    for kind in sorted(kinds):
        if reason := REASONS_AGAINST[kind](folder):
            raise Unsupported(f"no {kind} can run here: {reason}")


def no_container_because(folder: Path) -> str:
    """Why this machine cannot run containers with their disks in `folder`; empty if it can."""
    try:
        cgroup.mount_point()
    except Unsupported as error:
        return str(error)
    if set(":,") & set(str(folder)):
        return f"{folder} has a colon or a comma in its path, which an overlay's options cannot say: clone elsewhere"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="overlay-") as scratch:
        for name in ("lower", "upper", "work", "root"):
            Path(scratch, name).mkdir()
        options = "redirect_dir=on,lowerdir+=lower,upperdir=upper,workdir=work"
        mount = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, "root"]
        done = subprocess.run(mount, cwd=scratch, check=False, capture_output=True, text=True)
    if done.returncode:
        return (
            f"an overlay in {folder} cannot be mounted ({done.stderr.strip()}): it needs root in the machine's own "
            "namespaces (an unprivileged container has them not), Linux 6.7 and a disk that is no overlay itself"
        )
    return ""


def no_kernel_because(_: Path) -> str:
    """Why this machine cannot run user-mode kernels; empty if it can."""
    if not TUN.exists():
        return f"there is no {TUN}, by which a kernel reaches the network: modprobe tun"
    return ""


REASONS_AGAINST = {"container": no_container_because, "kernel": no_kernel_because}


def capabilities(folder: Path) -> dict[str, Any]:
    """Capabilities of this machine by kind of host, and the resource limits it enforces in containers."""
    kinds = {}
    for kind, reason_against in REASONS_AGAINST.items():
        missing = _missing_packages([kind])
        reason = f"not installed: {', '.join(missing)}" if missing else reason_against(folder)
        kinds[kind] = {"possible": not reason, "reason": reason, "gives": list(GIVES[kind])}
    limits = dict.fromkeys(LIMITS, False)
    with contextlib.suppress(Unsupported):
        limits = {name: name in cgroup.controllers() for name in LIMITS}
    return {"kinds": kinds, "limits": limits}


def require_memory(machines: Sequence[Machine]) -> None:
    """NoMemory if the hosts' memory exceeds the available memory."""
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
    """NoSpace if disks that are not created yet would not fit."""
    cache = image.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    new = sum(1 for machine in machines if not machine.exists())
    needs: list[tuple[Path, int]] = [(folder, new * HOST_SPACE)]
    made = [image.tree_path().exists()]
    if any(machine.kind == "kernel" for machine in machines):
        made += [image.image_path().exists(), kernel.folder(cache).exists()]
    if not all(made):
        needs.append((cache, IMAGE_SPACE))
    for place, needed in needs:
        free = shutil.disk_usage(place).free
        if needed > free:
            raise NoSpace(
                f"{place} needs {needed >> 20} MiB, {free >> 20} MiB are free: make room, or move "
                "the checkout (disks) or XDG_CACHE_HOME (base images)"
            )
