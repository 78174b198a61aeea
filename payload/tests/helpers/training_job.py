"""A small training job: a tiny model, generated data, and `llm-train run` as a user starts it."""

import json
import os
import secrets
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


HELPERS = Path(__file__).parent
HOLDS = f"""
import sys
if any("spawn_main" in each for each in sys.orig_argv):
    sys.path.append("{HELPERS}")
    import held_steps
"""


@cache
def forked_jobs() -> subprocess.Popen[str]:
    """The process of forked_jobs.py; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, str(HELPERS / "forked_jobs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS.parents[1])},
    )


class Forked:
    """A command of `llm-train` in a fork of that process: what tests use of a Popen."""

    def __init__(self, held: str, log: Path, *arguments: str) -> None:
        self.log = log
        self.returncode: int | None = None
        self.pid: int = self.told([held, str(log), *arguments])

    @staticmethod
    def told(question: object) -> Any:
        """The answer to a line."""
        forks = forked_jobs()
        assert forks.stdin
        assert forks.stdout
        forks.stdin.write(json.dumps(question) + "\n")
        forks.stdin.flush()
        return json.loads(forks.stdout.readline())

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.returncode is None:
            self.returncode = self.told(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"not done after {timeout} s: {self.log.read_text()}")
            time.sleep(0.05)
        return self.returncode  # type: ignore[return-value]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


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
        """Start `llm-train run` as a user does, in its own session, logging to JOB.log; `modules`: a folder for Python's path."""
        if held:
            modules = str(self.directory / f"hold-{job.stem}")
            Path(modules, "sitecustomize.py").write_text(HOLDS)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HELPERS.parents[1]}:{modules}",
            "HELD": held,
        }
        command = [sys.executable, "-m", "llmtrain", *self.running(job), *arguments]
        with job.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, text=True, env=environment, start_new_session=True
            )

    def fork(self, job: Path, *arguments: str, held: str = "") -> Forked:
        """The same in forks, which saves each process 5 s of CPU for its imports."""
        return Forked(held, job.with_suffix(".log"), *self.running(job), *arguments)

    def running(self, job: Path) -> list[str]:
        return ["run", str(job), "--key-file", str(self.directory / "key")]

    def hold(self, after: int, *jobs: Path) -> tuple[Path, str]:
        """Hold processes after so many steps of these jobs; returns the file whose removal releases them, and `held` for
        `start` and `fork`.

        Otherwise a test that has to wait for a core would be too late to disturb such a short job.
        """
        place = self.directory / f"hold-{jobs[0].stem}"
        place.mkdir()
        (place / "held").touch()
        metrics = [str(self.directory / job.stem / "metrics.jsonl") for job in jobs]
        return place / "held", ":".join([str(after), str(place / "held"), *metrics])

    def run(self, job: Path) -> int:
        """Run the job undisturbed, in forks; returns the exit code."""
        return self.fork(job).wait(timeout=300)

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


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str] | Forked, seconds: float = 240
) -> None:
    """Wait until the condition holds; fails if the process exits before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"exited with {process.returncode} before that"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def ranks(agent: subprocess.Popen[Any] | Forked) -> list[int]:
    """Ids of the live processes that torchrun's agent has started."""
    children = [
        pid for task in Path(f"/proc/{agent.pid}/task").glob("*/children") for pid in task.read_text().split()
    ]
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return sorted(pid for pid, line in commands.items() if b"spawn_main" in line or b"forked_jobs" in line)


def kill_a_rank(agent: subprocess.Popen[str] | Forked) -> None:
    """Kill the last rank with SIGKILL."""
    os.kill(ranks(agent)[-1], signal.SIGKILL)
