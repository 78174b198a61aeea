"""`make test` runs all of its parts, names those that fail, and what each test costs."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import ROOT

MAKEFILE = """
good:
\t@echo of good
bad:
\t@echo of bad; exit 3
later:
\t@echo of later
waits:
\t@timeout 20 sh -c 'until [ -e there ]; do sleep 0.05; done'
comes:
\t@touch there
test-kernel:
\t@echo a host was made
"""
# Even root makes no namespaces without it.
UNPRIVILEGED = ("setpriv", "--bounding-set=-sys_admin") if os.geteuid() == 0 else ()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def suite(
    folder: Path, *arguments: str, started_by: tuple[str, ...] = (), ci: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*started_by, ROOT / "tests/suite.py", *arguments],
        cwd=folder,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )


def verdicts(done: subprocess.CompletedProcess[str], count: int) -> list[str]:
    return [line.split("CPU-s  ")[1] for line in done.stdout.splitlines()[-count:]]


def test_a_part_that_fails_keeps_no_other_from_running_and_is_named_at_the_end(folder: Path) -> None:
    done = suite(folder, "good", "bad", "later", "--", "good")
    assert done.returncode == 1
    assert {"of good", "of bad", "of later"} <= set(done.stdout.splitlines())
    assert verdicts(done, 4) == [
        "good: passed",
        "bad: FAILED (2), see .lab/logs/bad.log",
        "later: passed",
        "good: passed",
    ]


def test_lanes_run_beside_each_other(folder: Path) -> None:
    assert suite(folder, "waits", "--", "comes").returncode == 0


def test_a_stage_begins_when_the_one_before_has_ended(folder: Path) -> None:
    (folder / "Makefile").write_text("before:\n\t@sleep 1; touch there\nafter:\n\t@test -e there\n")
    assert suite(folder, "before", "--", "before", "then", "after").returncode == 0


def test_the_parts_end_with_the_suite(folder: Path) -> None:
    # No fork after "begun": a shell that forks as the signal comes dies of it, and its new child never has it.
    (folder / "Makefile").write_text(f"one two:\n\t@echo $@ > begun; exec sleep 100\n{MAKEFILE}")
    os.mkfifo(folder / "begun")
    with subprocess.Popen(
        [ROOT / "tests/suite.py", "one", "good", "--", "two", "then", "good"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        begun = ""
        while begun.count("\n") < 2:
            begun += (folder / "begun").read_text()
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert "one: FAILED (" in said
    assert "two: FAILED (" in said
    assert "of good" not in said
    assert [
        line.endswith("good: FAILED, not run: the suite was ended") for line in said.splitlines()[-4:]
    ] == [
        False,
        True,
        False,
        True,
    ]


def test_a_part_that_starts_while_the_suite_is_told_to_end_ends_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runpy.run_path(str(ROOT / "tests/suite.py"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_handler: None)
    (folder / "Makefile").write_text("long:\n\t@sleep 100\n")
    (folder / ".lab/logs").mkdir(parents=True)
    running = module["Running"]()

    class Told(subprocess.Popen[str]):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            running.pass_on(signal.SIGTERM, None)

    monkeypatch.setattr(subprocess, "Popen", Told)
    outcome = running.run("long", lambda _line: None)
    assert outcome.verdict.startswith("FAILED (")
    assert outcome.wall < 50


@pytest.mark.parametrize(("ci", "status", "said"), [("", 0, "not run"), ("true", 1, "FAILED, not run")])
def test_a_part_that_makes_hosts_is_named_where_there_are_no_privileges_and_fails_in_ci(
    folder: Path, ci: str, status: int, said: str
) -> None:
    done = suite(folder, "good", "--", "test-kernel", started_by=UNPRIVILEGED, ci=ci)
    assert done.returncode == status, done.stderr
    assert "a host was made" not in done.stdout
    passed, not_run = verdicts(done, 2)
    assert passed == "good: passed"
    assert re.match(rf"test-kernel: {said}: (no namespaces can be made|the lab makes namespaces)", not_run)


def test_tests_for_which_there_was_no_time_are_counted(folder: Path) -> None:
    timings = json.dumps(
        {"one": {"cpu": 1, "hosts": 0, "wall": 1}, "two": {"cpu": 0, "hosts": 0, "wall": 0, "left_out": 1}}
    )
    (folder / "Makefile").write_text(f"short:\n\t@echo '{timings}' > $$LLMKEEP_LEDGER\n")
    done = suite(folder, "short")
    assert done.returncode == 0
    assert verdicts(done, 1) == ["short: passed, 1 of 2 tests left out for lack of time"]


def test_why_a_test_failed_stands_at_the_end_where_a_log_that_was_cut_has_it(folder: Path) -> None:
    costs = {"cpu": 1, "hosts": 0, "wall": 1}
    timings = {
        "of code": costs | {"failed": "a line\n" * 500 + "assert 1 == 2"},
        "of a host": costs | {"failed": "TASK [b]\nfatal: [llm1]: no disk" + " ok" * 5000},
    }
    (folder / "times").write_text(json.dumps(timings))
    (folder / "Makefile").write_text("short:\n\t@cp times $$LLMKEEP_LEDGER; exit 1\n")
    end = suite(folder, "short").stdout[-2000:]
    assert "assert 1 == 2" in end
    assert "fatal: [llm1]: no disk" in end


FLAKY = """
from pathlib import Path

def test_that_passes_at_the_second_try():
    there = Path("there").exists()
    Path("there").touch()
    assert there, "it was not there"

def test_that_passes():
    pass
"""


def test_a_test_that_passes_at_the_second_try_is_named_with_its_first_failure(folder: Path) -> None:
    (folder / "test_flaky.py").write_text(FLAKY)
    path = os.pathsep.join(map(str, (ROOT / "tests/helpers", ROOT)))
    words = "-p no:cacheprovider -p ledger --numprocesses 2 --reruns 1 test_flaky.py"
    (folder / "Makefile").write_text(f"flaky:\n\t@PYTHONPATH={path} {sys.executable} -m pytest {words}\n")
    done = suite(folder, "flaky")
    assert done.returncode == 0, done.stdout
    assert verdicts(done, 1) == ["flaky: passed, 1 of 2 tests at the second try"]
    named = "FLAKY flaky: test_flaky.py::test_that_passes_at_the_second_try: it passed at the second try"
    assert f"\n{named}, and failed before\nAssertionError: it was not there" in done.stdout
    assert "FLAKY flaky: test_flaky.py::test_that_passes:" not in done.stdout


def test_the_log_of_a_part_is_kept(folder: Path) -> None:
    suite(folder, "bad")
    assert (folder / ".lab/logs/bad.log").read_text().startswith("of bad\n")


def test_the_suite_passes_where_all_parts_do(folder: Path) -> None:
    assert suite(folder, "good", "later").returncode == 0


COSTLY = """
import subprocess, sys, time
from pathlib import Path
from ledger import hosts, leave, watch

def test_a_process_that_computes():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.4: pass"], check=True)

def test_a_wait():
    time.sleep(0.5)

def test_a_host_that_computes():
    group = Path("group")
    watch(group)
    group.mkdir()
    (group / "cpu.stat").write_text("usage_usec 7000000\\nuser_usec 1\\n")

def test_a_host_that_is_made_again_and_then_another_workers():
    again = Path("again")
    again.mkdir()
    watch(again)
    for microseconds in (200000, 100000):
        (again / "cpu.stat").write_text(f"usage_usec {microseconds}\\n")
        hosts()
    leave(again)
    (again / "cpu.stat").write_text("usage_usec 9000000\\n")
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
    assert tests["test_a_host_that_is_made_again_and_then_another_workers"]["hosts"] == pytest.approx(0.3)
    assert timings["parts"]["costly"]["cpu"] > 7.4, "the part's own processes, and the hosts"
    ranked = [
        line.rpartition("::")[2] for line in done.stdout.splitlines() if " CPU-s  costly: test_" in line
    ]
    assert ranked[:2] == ["test_a_host_that_computes", "test_a_process_that_computes"]


SKIPS = """
import pytest

def test_a_campaign():
    pytest.skip("minutes: `make storm`")

@pytest.mark.skipif(True, reason="no such program here")
def test_a_program():
    pass

@pytest.mark.xfail
def test_a_known_fault():
    assert False
"""


def in_ci(folder: Path, tests: str, ci: str = "true") -> str:
    """The output of a run of these tests by two workers."""
    (folder / "test_skips.py").write_text(tests)
    plugin = ("-p", "no:cacheprovider", "-p", "allowed_skips", "--numprocesses", "2")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "test_skips.py"],
        cwd=folder,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(ROOT / "tests/helpers")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_a_skip_fails_in_ci_unless_its_reason_is_listed(folder: Path) -> None:
    output = in_ci(folder, SKIPS)
    assert "1 skipped, 1 xfailed, 1 error" in output
    assert "no such program here\nCI skips nothing without a line of skips.txt" in output


def test_outside_of_ci_a_skip_is_no_failure(folder: Path) -> None:
    assert "2 skipped, 1 xfailed" in in_ci(folder, SKIPS, ci="")


def test_a_file_that_is_skipped_fails_in_ci(folder: Path) -> None:
    assert "1 error" in in_ci(folder, "import pytest\npytest.importorskip('no_such_module')\n")
