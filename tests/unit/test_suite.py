"""`make test` runs all of its parts and names those that fail."""

import subprocess
from pathlib import Path

import pytest
from plugin_modules import ROOT

MAKEFILE = """
good:
\t@echo of good
bad:
\t@echo of bad; exit 3
later:
\t@echo of later
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tests/suite.py", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_part_that_fails_keeps_no_other_from_running_and_is_named_at_the_end(folder: Path) -> None:
    done = suite(folder, "good", "bad", "--", "later")
    assert done.returncode == 1
    assert {"of good", "of bad", "of later"} <= set(done.stdout.splitlines())
    verdicts = [line.split(" s  ")[1] for line in done.stdout.splitlines()[-3:]]
    assert sorted(verdicts[:2]) == ["bad: FAILED (2), see .lab/logs/bad.log", "good: passed"]
    assert verdicts[2] == "later: passed"


def test_the_log_of_a_part_is_kept(folder: Path) -> None:
    suite(folder, "bad")
    assert (folder / ".lab/logs/bad.log").read_text().startswith("of bad\n")


def test_the_suite_passes_where_all_parts_do(folder: Path) -> None:
    assert suite(folder, "good", "--", "later").returncode == 0
