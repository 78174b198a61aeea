#!/usr/bin/python3.13
"""Run parts of the suite, each a target of the Makefile, to the end, and name those that fail.

usage: tests/suite.py PART... [-- PART...]

Stages, separated by `--`, follow each other; of a stage's parts two run at a time, since they wait as much as they work. The
output of a part is in `.lab/logs/PART.log`, and printed when the part ends, or at once where it is its stage's only one. The
exit status is 1 if a part failed.

The CPU seconds and wall time of parts and tests are in `.lab/timings.json`; the most expensive tests are printed.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

AT_A_TIME = 2
MOST_EXPENSIVE = 25
LOGS = Path(".lab/logs")
TIMINGS = Path(".lab/timings.json")


@dataclass(frozen=True)
class Outcome:
    """`cpu`: seconds of its processes, and of the hosts of its tests' labs; `wall`: seconds. `tests`: both, by test."""

    part: str
    status: int
    cpu: float
    wall: float
    tests: dict[str, dict[str, float]]

    def __str__(self) -> str:
        verdict = f"FAILED ({self.status}), see {log_of(self.part)}" if self.status else "passed"
        return f"{self.wall:7.0f} s {self.cpu:7.0f} CPU-s  {self.part}: {verdict}"


def log_of(part: str) -> Path:
    return LOGS / f"{part}.log"


def run(part: str, on_line: Callable[[str], object]) -> Outcome:
    """Make a part; each line of its output goes to its log, and to `on_line`."""
    started = time.monotonic()
    ledger = LOGS / f"{part}.timings.json"
    ledger.unlink(missing_ok=True)
    environment = os.environ | {"LLMKEEP_LEDGER": str(ledger.absolute())}
    command = ["make", "--no-print-directory", part]
    with (
        log_of(part).open("w") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            on_line(line)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    tests = json.loads(ledger.read_text()) if ledger.exists() else {}
    cpu = usage.ru_utime + usage.ru_stime + sum(test["hosts"] for test in tests.values())
    return Outcome(part, process.returncode, cpu, time.monotonic() - started, tests)


def stages(arguments: list[str]) -> list[list[str]]:
    groups = itertools.groupby(arguments, lambda argument: argument == "--")
    return [list(parts) for separator, parts in groups if not separator]


def outcomes(parts: list[str]) -> list[Outcome]:
    """Of a stage's parts, as they end."""
    if len(parts) == 1:
        return [run(parts[0], sys.stdout.write)]
    ended = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for future in as_completed([pool.submit(run, part, lambda _line: None) for part in parts]):
            outcome = future.result()
            print(log_of(outcome.part).read_text(), end="")
            print(outcome, flush=True)
            ended.append(outcome)
    return ended


def busy_seconds() -> float:
    """CPU seconds that this machine has worked, whatever for."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def report(ended: list[Outcome], busy: float) -> None:
    """Write the timings; print the most expensive tests, and each part with its verdict. `busy`: the cores' share."""
    parts = {each.part: {"cpu": each.cpu, "wall": each.wall} for each in ended}
    tests = {f"{each.part}: {name}": test for each in ended for name, test in each.tests.items()}
    TIMINGS.write_text(json.dumps({"busy": busy, "parts": parts, "tests": tests}, indent=1) + "\n")
    expensive = sorted(tests, key=lambda name: -tests[name]["cpu"])[:MOST_EXPENSIVE]
    print(f"\nThe most expensive of {len(tests)} tests:")
    for name in expensive:
        print(f"{tests[name]['wall']:7.0f} s {tests[name]['cpu']:7.0f} CPU-s  {name}")
    print(f"\nThe suite's parts, with {busy:.0%} of the cores busy:", *ended, sep="\n")


def main() -> int:
    if not stages(sys.argv[1:]):
        sys.exit(__doc__)
    LOGS.mkdir(parents=True, exist_ok=True)
    began, before = time.monotonic(), busy_seconds()
    ended = [outcome for parts in stages(sys.argv[1:]) for outcome in outcomes(parts)]
    report(ended, (busy_seconds() - before) / (time.monotonic() - began) / (os.cpu_count() or 1))
    return int(any(outcome.status for outcome in ended))


if __name__ == "__main__":
    sys.exit(main())
