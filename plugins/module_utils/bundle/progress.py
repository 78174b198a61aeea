"""How far a download is, in the journal: Ansible shows nothing of a task before its end. `journalctl -ft llmkeep-fetch`"""

from __future__ import annotations

import syslog
import time
from collections.abc import Callable

TAG = "llmkeep-fetch"
EVERY = 30.0  # seconds between two lines


def journal(line: str) -> None:
    """A line of the host's journal."""
    syslog.openlog(TAG, facility=syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_INFO, line)


def duration(seconds: float) -> str:
    """As `2 h 05 min`, `12 min` or `40 s`."""
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


class Progress:
    """The files of one folder on their way to this host. Sizes are in bytes."""

    def __init__(
        self,
        name: str,
        total: int,
        here: int,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`here` bytes of `total` came with an earlier run. Lines go to the journal where `say` takes none."""
        self.name, self.total, self.here, self.say, self.clock = name, total, here, say or journal, clock
        self.fetched = 0  # by this run
        self.begun = self.last_report = clock()
        self.waited = 0.0  # for other hosts' downloads
        self.say(f"{name}: {self._amount()}, fetching the rest")

    def add(self, size: int) -> None:
        """Count bytes written to the disk; a negative number where a file is started over."""
        self.fetched += size
        if self.clock() - self.last_report >= EVERY:
            self.last_report = self.clock()
            rate = self.fetched / max(self.last_report - self.begun - self.waited, 0.001)
            left = self.total - self.here - self.fetched
            estimate = f", about {duration(left / rate)} left" if rate > 0 else ""
            self.say(f"{self.name}: {self._amount()}, {rate / 1e6:.1f} MB/s{estimate}")

    def wait(self, seconds: float) -> None:
        """The mirror serves other hosts; it is asked again in so many seconds."""
        self.waited += seconds
        if self.clock() - self.last_report >= EVERY:
            self.last_report = self.clock()
            self.say(f"{self.name}: {self._amount()}, waiting for the mirror, which serves other hosts")

    def end(self) -> None:
        """All files are here and as signed."""
        self.say(
            f"{self.name}: all {self.total / 1e9:.1f} GB are here, after {duration(self.clock() - self.begun)}"
        )

    def _amount(self) -> str:
        return f"{(self.here + self.fetched) / 1e9:.1f} of {self.total / 1e9:.1f} GB"
