"""A small training job: a tiny model, generated data, and `llm-train run` as a user starts it."""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from tiny import make_model

from llmcore.manifest import write_manifest
from llmtrain.data.rows import Row, tokenizer_digest, write_index, write_shard

SEQ_LEN, END = 64, 1  # tokens per row; the tiny tokenizer's end-of-message token


def make_row(generator: numpy.random.Generator, stops: bool = True) -> Row:
    """Two documents and padding; the first tokens of each document are a prompt, which is excluded from the loss."""
    lengths = 32, 29, SEQ_LEN - 61
    document = numpy.repeat(numpy.array([1, 2, 0], numpy.int32), lengths)
    # Every other token follows from the one before: something to learn.
    ids = generator.integers(10, 60, SEQ_LEN).astype(numpy.int32)
    ids[1::2] = (ids[::2] * 7 + 3) % 50 + 10
    ids[[31, 60]] = END
    learned = (document > 0).astype(numpy.uint8)
    learned[:6] = learned[32:36] = 0
    if not stops:
        learned[[31, 60]] = 0
    return Row(ids, learned, document)


def write_rows(directory: Path, tokenizer: str, rows: list[Row]) -> Path:
    """Write a data set of one shard."""
    directory.mkdir()
    write_index(directory, SEQ_LEN, tokenizer, [write_shard(directory, 0, rows)])
    return directory


# In a training process: once `after` steps are reported, wait at the next one until SIGTERM, or until the file HELD is removed.
HOLDS = """
import os, signal, sys, time
if any("spawn_main" in each for each in sys.orig_argv):
    asked_to_stop, read_clock, handle = [], time.process_time, signal.signal

    def steps_in(path):
        try:
            with open(path) as lines:
                return sum('"lr"' in line for line in lines)
        except FileNotFoundError:
            return 0

    def wait():
        after, held, *metrics = os.environ["HELD"].split(":")
        while sum(map(steps_in, metrics)) >= int(after) and os.path.exists(held) and not asked_to_stop:
            time.sleep(0.01)
        return read_clock()

    def noting(number, handler):
        if number != signal.SIGTERM or not callable(handler):
            return handle(number, handler)
        return handle(number, lambda *given: (asked_to_stop.append(1), handler(*given)))

    time.process_time, signal.signal = wait, noting  # the loop looks at this clock at each step
"""


@cache
def forked_jobs() -> subprocess.Popen[str]:
    """The process of forked_jobs.py; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_jobs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@dataclass
class Bench:
    """A directory with a model, data and a key, in which jobs run."""

    directory: Path
    model: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.directory / "tiny"
        make_model(self.model)
        write_manifest(self.model, self.directory / "tiny.sha256")
        key = self.directory / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(32))
        generator = numpy.random.default_rng(5)
        tokenizer = tokenizer_digest(self.model)
        write_rows(self.directory / "data", tokenizer, [make_row(generator) for _ in range(96)])
        write_rows(self.directory / "held-out", tokenizer, [make_row(generator) for _ in range(5)])

    def job(self, file: str, **changes: Any) -> Path:
        """Write FILE.yaml; `changes` are merged into its sections."""
        job: dict[str, Any] = {
            "name": file,
            "model": str(self.model),
            "method": {"kind": "lora"},
            "data": {"train": str(self.directory / "data")},
            "output": str(self.directory / file),
            "optim": {"lr": 1e-2, "precision": "fp32"},
            "scale": {"strategy": "ddp", "processes": 2, "micro_batch": 2, "tokens_per_step": 8 * SEQ_LEN},
            "watch": {"log_every": 1},
        }
        for section, change in changes.items():
            job[section] = (
                {**job[section], **change} if section in job and isinstance(change, dict) else change
            )
        path = self.directory / f"{file}.yaml"
        path.write_text(json.dumps(job))
        return path

    def start(self, job: Path, *arguments: str, modules: str = "", held: str = "") -> subprocess.Popen[str]:
        """Start `llm-train run` in its own session, with output in JOB.log and the folder `modules` on Python's path."""
        command = [
            sys.executable,
            "-m",
            "llmtrain",
            "run",
            str(job),
            "--key-file",
            str(self.directory / "key"),
            *arguments,
        ]
        path = f"{Path(__file__).parents[2]}:{modules}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HELD": held}
        with job.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, text=True, env=environment, start_new_session=True
            )

    def hold(self, after: int, *jobs: Path) -> tuple[Path, dict[str, str]]:
        """Hold processes after so many steps of these jobs; returns the file whose removal releases them, and
        arguments for `start`.

        Otherwise a test that has to wait for a core would be too late to disturb such a short job.
        """
        place = self.directory / f"hold-{jobs[0].stem}"
        place.mkdir()
        (place / "sitecustomize.py").write_text(HOLDS)
        (place / "held").touch()
        metrics = [str(self.directory / job.stem / "metrics.jsonl") for job in jobs]
        return place / "held", {
            "modules": str(place),
            "held": ":".join([str(after), str(place / "held"), *metrics]),
        }

    def run(self, job: Path) -> int:
        """Run the job undisturbed, in forks; returns the exit code. What disturbs a job starts it as a user does."""
        forks = forked_jobs()
        assert forks.stdin
        assert forks.stdout
        asked = [str(job.with_suffix(".log")), "run", str(job), "--key-file", str(self.directory / "key")]
        forks.stdin.write(json.dumps(asked) + "\n")
        forks.stdin.flush()
        if not select.select([forks.stdout], [], [], 300)[0]:
            forks.kill()
            raise AssertionError(f"not done after 300 s: {self.said(job)}")
        return int(forks.stdout.readline())

    def said(self, job: Path) -> str:
        """Everything that was printed."""
        return job.with_suffix(".log").read_text()

    def metrics(self, job: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without one that is being written."""
        path = self.directory / job.stem / "metrics.jsonl"
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        return [json.loads(line) for line in whole.splitlines()]

    def losses(self, job: Path) -> dict[int, float]:
        """Loss by step; the later one, if a step was repeated."""
        return {line["step"]: line["loss"] for line in self.metrics(job) if "lr" in line}

    def record(self, job: Path, kind: str = "adapter") -> dict[str, Any]:
        """The content of training.json."""
        found: dict[str, Any] = json.loads((self.directory / job.stem / kind / "training.json").read_text())
        return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait until the condition holds; fails if the process exits before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"exited with {process.returncode} before that"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def ranks(agent: subprocess.Popen[Any]) -> list[int]:
    """Ids of the live processes that torchrun's agent has started."""
    children = [
        pid for task in Path(f"/proc/{agent.pid}/task").glob("*/children") for pid in task.read_text().split()
    ]
    return sorted(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def kill_a_rank(agent: subprocess.Popen[str]) -> None:
    """Kill the last rank with SIGKILL."""
    os.kill(ranks(agent)[-1], signal.SIGKILL)
