"""A pytest plugin: CPU seconds and wall time of each test, its fixtures, the processes that it waits for, and its labs' hosts.

`make test` names the file in LLMKEEP_LEDGER; without it nothing is written. What a fixture starts is the cost of the test that
needs it first; a server that a fixture ends, of the last one.
"""

import json
import os
import resource
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FILE = "LLMKEEP_LEDGER"
TIME_IS_UP = "the run's time was up"  # why a test was left out; tests/skips.txt allows it
LABS: dict[Path, float] = {}  # control groups of this worker's labs: CPU seconds when last read
SPENT: defaultdict[Path, float] = defaultdict(float)  # while they were this worker's


class Ledger:
    """The sums of this run, and in each worker the CPU seconds at the end of the phase before."""

    def __init__(self) -> None:
        self.tests: defaultdict[str, dict[str, Any]] = defaultdict(
            lambda: {"cpu": 0.0, "hosts": 0.0, "wall": 0.0}
        )
        self.own, self.hosts = own(), hosts()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Each phase's report takes its CPU seconds to the process that writes the file."""
        report = yield
        before, self.own, self.hosts = (self.own, self.hosts), own(), hosts()
        setattr(report, "cpu", (self.own - before[0], self.hosts - before[1]))  # noqa: B010 -- pytest's reports take any
        return report

    def pytest_runtest_logstart(self) -> None:
        """What lies between two tests is no test's."""
        self.own, self.hosts = own(), hosts()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Sum up the phases of a test."""
        test = self.tests[report.nodeid]
        cpu, of_hosts = vars(report).get("cpu", (0.0, 0.0))  # none where a worker crashed
        test["cpu"] += cpu + of_hosts
        test["hosts"] += of_hosts
        test["wall"] += report.duration
        if report.skipped and TIME_IS_UP in str(report.longrepr):
            test["left_out"] = 1.0
        if report.outcome in ("failed", "rerun"):
            crash = getattr(report.longrepr, "reprcrash", None)
            outcome = "failed" if report.failed else "failed_first"
            test[outcome] = crash.message if crash else report.longreprtext

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the file, in the process that has all reports."""
        if not hasattr(session.config, "workerinput"):
            Path(os.environ[FILE]).write_text(json.dumps(self.tests, indent=1), encoding="utf-8")


def own() -> float:
    """CPU seconds of this process and of the children that it waited for."""
    usage = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def hosts() -> float:
    """CPU seconds of the labs' hosts; those of a lab that is gone stay counted."""
    for group, last in LABS.items():
        now = used(group)
        SPENT[group] += now - last if now >= last else now  # a lab that was made again begins at 0
        LABS[group] = now
    return sum(SPENT.values())


def used(group: Path) -> float:
    """CPU seconds of a control group; 0 if there is none."""
    try:
        usage = (group / "cpu.stat").read_text(encoding="ascii").split()
    except OSError:
        return 0.0
    return int(usage[usage.index("usage_usec") + 1]) / 1e6


def watch(group: Path) -> None:
    """Count what a lab's control group uses from now on."""
    LABS.setdefault(group, used(group))


def leave(group: Path) -> None:
    """Count no more of a lab that another worker drives from now on."""
    hosts()
    LABS.pop(group, None)


def pytest_configure(config: pytest.Config) -> None:
    """Begin the ledger, if its file is named."""
    if FILE in os.environ:
        config.pluginmanager.register(Ledger())
