"""What a person is told of long work: a line a step with its time, a sign of life, and the end of a log where it fails."""

import io
import os
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from lab import steps as steps_module
from lab.errors import LabError
from lab.steps import RoleTimes, Steps

TREE = Path(__file__).parents[3]
ANSIBLE = """
PLAY [Control node and mirror] *****
TASK [base : Validating arguments against arg spec 'main'] *****
ok: [ops1]
TASK [base : Install the floor's packages] *****
changed: [ops1]
TASK [llmkeep.estate._common : Run the checks] *****
ok: [ops1]
TASK [llmkeep.estate.pki : Make a key] *****
changed: [ops1 -> localhost]
ok: [llm1]
PLAY RECAP *****
ops1 : ok=4 changed=2
"""


@pytest.fixture
def told(tmp_path: Path) -> tuple[Steps, io.StringIO]:
    said = io.StringIO()
    return Steps(Console(file=said, width=200), tmp_path / "logs"), said


def lines(said: io.StringIO) -> list[str]:
    """What was told, without its times."""
    return [line.partition(" s  ")[2].strip() for line in said.getvalue().splitlines()]


def test_each_role_is_a_line_for_each_of_its_hosts(told: tuple[Steps, io.StringIO]) -> None:
    steps, said = told
    heard = RoleTimes(steps, lambda _: None)
    for line in ANSIBLE.splitlines():
        heard(line)
    assert [" ".join(line.split()) for line in lines(said)] == [
        "ops1 base 1 changed",
        "ops1 pki 1 changed",
        "llm1 pki",
    ]


def test_a_detail_goes_on_with_its_step(told: tuple[Steps, io.StringIO]) -> None:
    steps, said = told
    with steps.series() as begin:
        for text in ("building: 1 of 2", "building: 2 of 2", "unpacking"):
            begin(text)
    assert lines(said) == ["building", "unpacking"]


def test_a_long_step_gives_signs_of_life_in_a_plain_log(
    told: tuple[Steps, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "HEARTBEAT_SECONDS", 0.05)
    steps, said = told
    with steps.step("copy") as now:
        now("the third file")
        end = time.monotonic() + 10
        while "the third file" not in said.getvalue():
            assert time.monotonic() < end
    assert lines(said)[-1] == "copy"


def test_a_command_that_fails_shows_the_end_of_its_log_and_where_it_is(
    told: tuple[Steps, io.StringIO],
) -> None:
    steps, said = told
    with pytest.raises(LabError, match=r"exit code 3; the end of .*/site\.log:\n  line 6\n(.|\n)*line 20$"):
        steps.run(["sh", "-c", "for n in $(seq 20); do echo line $n; done; exit 3"], "site", lambda _: None)
    assert said.getvalue() == ""
    assert (steps.logs / "site.log").read_text().startswith("line 1\n")


def step(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TREE / "lab/step", "log", "do it", *command], cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_step_of_make_is_one_line_and_its_output_a_log(tmp_path: Path) -> None:
    done = step(tmp_path, "sh", "-c", "echo said; echo complained >&2")
    assert (done.returncode, done.stderr, done.stdout.partition(" s  ")[2]) == (0, "", "do it\n")
    assert (tmp_path / ".lab/logs/log.log").read_text() == "said\ncomplained\n"


def test_a_step_of_make_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    done = step(tmp_path, "sh", "-c", "echo no room; exit 4")
    assert done.returncode == 4
    assert done.stdout == ""
    assert "do it: failed (4); the end of .lab/logs/log.log:\n  no room\n" in done.stderr


IS_ROOT = os.geteuid() == 0
AS_USER = ["setpriv", "--reuid=65534", "--clear-groups"] if IS_ROOT else []
WITHOUT_A_CAPABILITY = ["setpriv", "--bounding-set=-sys_admin"] if IS_ROOT else []
NEED_NO_PRIVILEGES = "without privileges, run `make serve` (the API alone, on this machine) or `make check`"


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        (
            [*AS_USER, "lab/preflight"],
            2,
            f"you are user {65534 if IS_ROOT else os.geteuid()}: run it as root",
        ),
        (["lab/preflight", "99000000"], 1, "MB of memory are available, 99000000 are needed: stop something"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_installed(
    command: list[str], status: int, told: str
) -> None:
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert told in done.stderr


@pytest.mark.parametrize("restriction", [AS_USER, WITHOUT_A_CAPABILITY])
def test_a_refusal_for_want_of_privileges_names_what_needs_none(restriction: list[str]) -> None:
    done = subprocess.run(
        [*restriction, "lab/preflight"], cwd=TREE, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"make: {NEED_NO_PRIVILEGES}")


@pytest.mark.skipif(not IS_ROOT, reason="needs root's privileges")
def test_another_refusal_does_not() -> None:
    done = subprocess.run(
        ["lab/preflight", "99000000"], cwd=TREE, capture_output=True, text=True, check=False, timeout=60
    )
    assert NEED_NO_PRIVILEGES not in done.stderr
