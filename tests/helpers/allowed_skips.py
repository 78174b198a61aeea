"""A pytest plugin: in CI (CI=true), a test that is skipped has failed, unless `tests/skips.txt` has its reason."""

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).parents[1] / "skips.txt"


def reasons() -> list[re.Pattern[str]]:
    """The reasons that are allowed."""
    lines = LIST.read_text(encoding="ascii").splitlines()
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


class AllowedSkips:
    def __init__(self) -> None:
        self.reasons = reasons()

    def judge(self, report: Any) -> Any:
        """Fail what was skipped for another reason; what is expected to fail is not skipped."""
        if report.skipped and not hasattr(report, "wasxfail"):
            _, _, reason = report.longrepr
            if not any(each.search(reason) for each in self.reasons):
                report.outcome = "failed"
                report.longrepr = f"{reason}\nCI skips nothing without a line of {LIST.name}"
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        return self.judge((yield))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self) -> Generator[None, Any, Any]:
        return self.judge((yield))


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(AllowedSkips())
