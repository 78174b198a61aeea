#!/usr/bin/python3.13
"""Run parts of the suite, each a target of the Makefile, to the end, and name those that fail.

usage: tests/suite.py PART... [-- PART...]

Stages, separated by `--`, follow each other; of a stage's parts two run at a time, since they wait as much as they work. The
output of a part is in `.lab/logs/PART.log`, and printed when the part ends, or at once where it is its stage's only one. The
exit status is 1 if a part failed.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

AT_A_TIME = 2
LOGS = Path(".lab/logs")


@dataclass(frozen=True)
class Outcome:
    part: str
    status: int
    seconds: float

    def __str__(self) -> str:
        verdict = f"FAILED ({self.status}), see {log_of(self.part)}" if self.status else "passed"
        return f"{self.seconds:7.0f} s  {self.part}: {verdict}"


def log_of(part: str) -> Path:
    return LOGS / f"{part}.log"


def run(part: str, on_line: Callable[[str], object]) -> Outcome:
    """Make a part; each line of its output goes to its log, and to `on_line`."""
    started = time.monotonic()
    command = ["make", "--no-print-directory", part]
    with (
        log_of(part).open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            on_line(line)
    return Outcome(part, process.wait(), time.monotonic() - started)


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


def main() -> int:
    if not stages(sys.argv[1:]):
        sys.exit(__doc__)
    LOGS.mkdir(parents=True, exist_ok=True)
    ended = [outcome for parts in stages(sys.argv[1:]) for outcome in outcomes(parts)]
    print("\nThe suite's parts:", *ended, sep="\n")
    return int(any(outcome.status for outcome in ended))


if __name__ == "__main__":
    sys.exit(main())
