#!/usr/bin/python3.13
"""Run parts of the suite, each a target of the Makefile, to the end, and name those that fail.

usage: tests/suite.py PART... [-- PART...] [then PART...]

Lanes, separated by `--`, run beside each other; a lane's parts follow one another, as do stages, separated by `then`. The
output of a part is in `.lab/logs/PART.log`, and printed when the part ends, or at once where its stage has no other lane. The
exit status is 1 if a part failed. A part that makes hosts does not run where `lab/preflight` finds no privileges for them; with
CI=true, it has failed.

The commit, and verdicts, CPU seconds and wall time of parts and tests are in `.lab/timings.json`; the most expensive tests are
printed, why tests failed, at the first try or for good, and each part with its budget in `tests/budget.yml`.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TREE = Path(__file__).resolve().parent.parent
MAKE_HOSTS = ("floor", "test-containers", "test-hosts", "test-kernel")
UNPRIVILEGED = 2  # what lab/preflight exits with where nothing else is missing
MOST_EXPENSIVE = 25
REASON_CHARACTERS = 600  # of a failed test, at the end, where a log that was cut still has them
LOGS = Path(".lab/logs")
TIMINGS = Path(".lab/timings.json")
BUDGETS: dict[str, int] = yaml.safe_load((TREE / "tests/budget.yml").read_text())["parts"]


@dataclass(frozen=True)
class Outcome:
    """`cpu`: seconds of its processes, and of the hosts of its tests' labs; `wall`: seconds. `tests`: both, by test."""

    part: str
    verdict: str = "passed"
    cpu: float = 0.0
    wall: float = 0.0
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        budget = f"of {BUDGETS[self.part]:5d}" if self.part in BUDGETS else " " * 8
        return f"{self.wall:7.0f} s {self.cpu:7.0f} {budget} CPU-s  {self.part}: {self.verdict}"


class Running:
    """The parts that run. Each is a session of its own: cores are shared by sessions, of which a lab has many."""

    def __init__(self) -> None:
        self.sessions: set[int] = set()
        self.ended = False
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.pass_on)

    def pass_on(self, number: int, _frame: object) -> None:
        """What a terminal, or the one who started this, tells this process is meant for the parts; none begins after it."""
        self.ended = True
        for session in list(self.sessions):
            os.killpg(session, number)

    def run(self, part: str, on_line: Callable[[str], object]) -> Outcome:
        """Make a part; each line of its output goes to its log, and to `on_line`."""
        if self.ended:
            return Outcome(part, "FAILED, not run: the suite was ended")
        started = time.monotonic()
        ledger = LOGS / f"{part}.timings.json"
        ledger.unlink(missing_ok=True)
        log = LOGS / f"{part}.log"
        with (
            log.open("w") as file,
            subprocess.Popen(
                ["make", "--no-print-directory", part],
                env=os.environ | {"LLMKEEP_LEDGER": str(ledger.absolute())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as process,
        ):
            self.sessions.add(process.pid)
            if self.ended:  # between the start of the process and its entry
                os.killpg(process.pid, signal.SIGTERM)
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                on_line(line)
            self.sessions.discard(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        tests = json.loads(ledger.read_text()) if ledger.exists() else {}
        verdict = "passed"
        if left_out := sum("left_out" in test for test in tests.values()):
            verdict += f", {left_out} of {len(tests)} tests left out for lack of time"
        if retried := sum("failed_first" in test for test in tests.values()):
            verdict += f", {retried} of {len(tests)} tests at the second try"
        if process.returncode:
            verdict = f"FAILED ({process.returncode}), see {log}"
        cpu = usage.ru_utime + usage.ru_stime + sum(test["hosts"] for test in tests.values())
        return Outcome(part, verdict, cpu, time.monotonic() - started, tests)


Lanes = list[list[str]]


def split(arguments: list[str], separator: str) -> list[list[str]]:
    groups = itertools.groupby(arguments, lambda argument: argument == separator)
    return [list(words) for separates, words in groups if not separates]


def without_hosts(stages: list[Lanes]) -> tuple[list[Lanes], list[Outcome]]:
    """The parts that can run here, and what is to be said of the others."""
    wanted = [part for lanes in stages for lane in lanes for part in lane if part in MAKE_HOSTS]
    if not wanted:
        return stages, []
    done = subprocess.run([TREE / "lab/preflight"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return stages, []
    if done.returncode != UNPRIVILEGED:
        sys.exit(done.stderr)
    why = done.stderr.splitlines()[0].removeprefix("make: ")
    verdict = "FAILED, not run" if os.environ.get("CI") == "true" else "not run"
    able = [[[part for part in lane if part not in MAKE_HOSTS] for lane in lanes] for lanes in stages]
    return able, [Outcome(part, f"{verdict}: {why}") for part in wanted]


def outcomes(stages: list[Lanes]) -> Iterator[Outcome]:
    """Of all parts."""
    running = Running()

    def run(lane: list[str]) -> list[Outcome]:
        ended = []
        for part in lane:
            outcome = running.run(part, lambda _line: None)
            log = LOGS / f"{part}.log"
            print((log.read_text() if outcome.wall else "") + f"{outcome}\n", end="", flush=True)
            ended.append(outcome)
        return ended

    for lanes in stages:
        match [lane for lane in lanes if lane]:
            case [lane]:
                yield from (running.run(part, sys.stdout.write) for part in lane)
            case several:
                with ThreadPoolExecutor(len(several) or 1) as pool:
                    yield from itertools.chain.from_iterable(pool.map(run, several))


def busy_seconds() -> float:
    """CPU seconds that this machine has worked, whatever for."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def reason(said: str) -> str:
    """Of why a test failed: the failed task, where Ansible names one, or the end."""
    start = said.find("fatal: ")
    return said[-REASON_CHARACTERS:] if start < 0 else said[start : start + REASON_CHARACTERS]


def revision() -> str:
    """The commit of the tree in this folder, with `-dirty` where files differ from it or are untracked; empty without git."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode:
        return ""
    changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=False).stdout
    return commit.stdout.strip() + ("-dirty" if changes else "")


def report(ended: list[Outcome], busy: float, commit: str) -> None:
    """Write the timings; print the most expensive tests, why tests failed, and each part's verdict. `busy`: the cores' share."""
    parts = {each.part: {"cpu": each.cpu, "wall": each.wall, "verdict": each.verdict} for each in ended}
    tests = {f"{each.part}: {name}": test for each in ended for name, test in each.tests.items()}
    TIMINGS.write_text(
        json.dumps({"commit": commit, "busy": busy, "parts": parts, "tests": tests}, indent=1) + "\n"
    )
    expensive = sorted(tests, key=lambda name: -tests[name]["cpu"])[:MOST_EXPENSIVE]
    print(f"\nThe most expensive of {len(tests)} tests:")
    for name in expensive:
        print(f"{tests[name]['wall']:7.0f} s {tests[name]['cpu']:7.0f} CPU-s  {name}")
    for name, test in tests.items():
        if "failed" in test:
            print(f"\nFAILED {name}\n{reason(test['failed'])}")
        elif "failed_first" in test:
            print(
                f"\nFLAKY {name}: it passed at the second try, and failed before\n{reason(test['failed_first'])}"
            )
    print(f"\nThe suite's parts and their budgets, with {busy:.0%} of the cores busy:", *ended, sep="\n")


def main() -> int:
    stages = [split(stage, "--") for stage in split(sys.argv[1:], "then")]
    if not stages:
        sys.exit(__doc__)
    stages, unable = without_hosts(stages)
    LOGS.mkdir(parents=True, exist_ok=True)
    began, before, commit = time.monotonic(), busy_seconds(), revision()
    ended = [*outcomes(stages), *unable]
    if revision() != commit:
        commit = f"{commit}, which changed meanwhile"
    report(ended, (busy_seconds() - before) / (time.monotonic() - began) / (os.cpu_count() or 1), commit)
    return int(any(outcome.verdict.startswith("FAILED") for outcome in ended))


if __name__ == "__main__":
    sys.exit(main())
