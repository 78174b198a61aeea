"""`make test` runs all of its parts, names those that fail, and what each test costs."""

import json
import os
import subprocess
import sys
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
    verdicts = [line.split("CPU-s  ")[1] for line in done.stdout.splitlines()[-3:]]
    assert sorted(verdicts[:2]) == ["bad: FAILED (2), see .lab/logs/bad.log", "good: passed"]
    assert verdicts[2] == "later: passed"


def test_the_log_of_a_part_is_kept(folder: Path) -> None:
    suite(folder, "bad")
    assert (folder / ".lab/logs/bad.log").read_text().startswith("of bad\n")


def test_the_suite_passes_where_all_parts_do(folder: Path) -> None:
    assert suite(folder, "good", "--", "later").returncode == 0


COSTLY = """
import subprocess, sys, time
from pathlib import Path
from ledger import watch

def test_a_process_that_computes():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.4: pass"], check=True)

def test_a_wait():
    time.sleep(0.5)

def test_a_host_that_computes():
    group = Path("group")
    watch(group)
    group.mkdir()
    (group / "cpu.stat").write_text("usage_usec 7000000\\nuser_usec 1\\n")
"""


def test_the_cost_of_a_test_is_the_cpu_of_its_processes_and_hosts_and_not_its_wall_time(folder: Path) -> None:
    (folder / "test_costly.py").write_text(COSTLY)
    (folder / "conftest.py").write_text('pytest_plugins = ["ledger"]\n')
    path = os.pathsep.join(map(str, (ROOT / "tests/helpers", ROOT)))
    pytest_run = (
        f"PYTHONPATH={path} {sys.executable} -m pytest -p no:cacheprovider --numprocesses 2 test_costly.py"
    )
    (folder / "Makefile").write_text(f"costly:\n\t@{pytest_run}\n")
    done = suite(folder, "costly")
    assert done.returncode == 0, done.stdout
    timings = json.loads((folder / ".lab/timings.json").read_text())
    tests = {name.partition("::")[2]: test for name, test in timings["tests"].items()}
    assert tests["test_a_process_that_computes"]["cpu"] >= 0.4
    assert tests["test_a_wait"]["wall"] >= 0.5 > tests["test_a_wait"]["cpu"]
    assert tests["test_a_host_that_computes"]["hosts"] == 7.0
    assert timings["parts"]["costly"]["cpu"] > 7.4, "the part's own processes, and the hosts"
    ranked = [
        line.rpartition("::")[2] for line in done.stdout.splitlines() if " CPU-s  costly: test_" in line
    ]
    assert ranked[:2] == ["test_a_host_that_computes", "test_a_process_that_computes"]
