"""CPU and memory of a program and all its descendants, by a control group, including those that outlive it, such as an SSH
master."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.cgroup import Group, mount_point

EACH_SECONDS = 0.2  # between two looks at the memory


class Spent:
    """Made and removed by a `with`, which ends the processes that are left in it; needs root."""

    def __init__(self) -> None:
        self.group = Group(mount_point() / f"llmkeep-bench-{os.getpid()}")
        self.peak = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self.group.create()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._sampler.join()
        self.group.kill()
        self.group.remove()

    @property
    def entry(self) -> Path:
        """A process that writes 0 to it, and all that it will start, is in the group."""
        return self.group.path / "cgroup.procs"

    def cpu(self) -> float:
        """Seconds of CPU, user and system, since the beginning."""
        usage = (self.group.path / "cpu.stat").read_text(encoding="ascii").split()
        return int(usage[usage.index("usage_usec") + 1]) / 1e6

    def memory(self) -> int:
        """Bytes now; a page that processes share, as those that Ansible forks do, counts once."""
        shares = 0
        for pid in self.entry.read_text(encoding="ascii").split():
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").split()
                shares += int(rollup[rollup.index("Pss:") + 1]) * 1024
            except (OSError, ValueError):  # it has ended
                continue
        return shares

    def _sample(self) -> None:
        while not self._over.wait(EACH_SECONDS):
            self.peak = max(self.peak, self.memory())
