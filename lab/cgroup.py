"""Control groups (version 2): freeze, kill and list the processes of a container."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError, Unsupported

MOUNTS = Path("/proc/self/mounts")


def mount_point() -> Path:
    """Mount point of this machine's cgroup2 hierarchy; Unsupported if there is none."""
    for line in MOUNTS.read_text(encoding="utf-8").splitlines():
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    raise Unsupported(
        "this machine has no writable cgroup2 hierarchy, which holds a container's processes: "
        "mount -t cgroup2 none /sys/fs/cgroup/unified, or run the lab outside an unprivileged container"
    )


def controllers() -> frozenset[str]:
    """Controllers available in cgroup2; empty if cgroup v1 holds them."""
    return frozenset((mount_point() / "cgroup.controllers").read_text(encoding="ascii").split())


@dataclass(frozen=True)
class Group:
    """One group of processes, and those below it."""

    path: Path

    def create(self) -> None:
        """Create it and its parents, with all available controllers delegated."""
        root = mount_point()
        below = [*reversed([each for each in self.path.parents if each.is_relative_to(root)])]
        for parent in below:
            parent.mkdir(exist_ok=True)
            for controller in controllers():
                (parent / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
        self.path.mkdir(exist_ok=True)

    def limit_memory(self, size: int) -> None:
        """Limit its memory to `size` bytes, if the memory controller is available."""
        limit = self.path / "memory.max"
        if limit.exists():
            limit.write_text(str(size), encoding="ascii")

    def kill(self, seconds: float = 10.0) -> None:
        """Kill every process (SIGKILL); LabError if one is left after `seconds`."""
        if self.path.exists():
            (self.path / "cgroup.kill").write_text("1", encoding="ascii")
            self._wait("populated 0", seconds)

    def freeze(self, seconds: float = 10.0) -> None:
        """Suspend every process."""
        (self.path / "cgroup.freeze").write_text("1", encoding="ascii")
        self._wait("frozen 1", seconds)

    def thaw(self) -> None:
        """Resume every process."""
        (self.path / "cgroup.freeze").write_text("0", encoding="ascii")

    def remove(self) -> None:
        """Remove it and the groups below it, which must be empty. Systemd mirrors it if it has a hierarchy of its own."""
        name = self.path.relative_to(mount_point())
        for place in (self.path, Path("/sys/fs/cgroup/systemd") / name):
            for folder, _, _ in os.walk(place, topdown=False):
                Path(folder).rmdir()

    def _wait(self, state: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while state not in (self.path / "cgroup.events").read_text(encoding="ascii"):
            if time.monotonic() > deadline:
                raise LabError(
                    f"the processes of {self.path} are not {state!r} after {seconds:.0f} s: "
                    "look at them with `ps`, then run this again"
                )
            time.sleep(0.01)
