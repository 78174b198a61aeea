"""The state of a training job: the part that checkpoints hold, and the objects a rank works with."""

import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmtrain.data.rows import Rows
from llmtrain.job import Job
from llmtrain.run.batches import Make
from llmtrain.run.checkpoint import Checkpoints
from llmtrain.run.health import Health, Norms
from llmtrain.run.report import Report
from llmtrain.run.setup import Setup, kind
from llmtrain.run.strategies.protocol import Strategy


@dataclass(kw_only=True)
class TrainingState:
    """The progress of a job, saved with each checkpoint and in training.json. Steps are strings where they are JSON keys."""

    step: int = 0  # the last one taken
    cursor: int = 0  # rows taken so far by all ranks together
    losses: dict[str, float] = field(default_factory=dict)  # by step
    evaluations: dict[str, float] = field(default_factory=dict)  # the loss on held-out rows, by step
    best: float | None = None  # lowest loss in `evaluations`
    worse: int = 0  # evaluations since the best one
    resumed: list[dict[str, Any]] = field(
        default_factory=list
    )  # step, world_size, and what could not be restored
    data: list[str]  # digests of the data sets
    job_digest: str
    world_size: int


@dataclass
class Training:
    """A running job on one rank."""

    job: Job
    setup: Setup
    device: torch.device
    rows: Rows
    held_out: Rows | None
    strategy: Strategy
    evidence: dict[str, Any]  # from all ranks, see `proven`
    checkpoints: Checkpoints
    report: Report
    health: Health
    state: TrainingState
    saved_at: float  # time.monotonic() of the last save
    make: Make | None  # of batches, where the rows are for DPO or KTO
    make_held_out: Make | None

    @property
    def rows_a_step(self) -> int:
        """Rows that all ranks together take in a step."""
        return self.setup.micro_batch * self.setup.accumulation * self.strategy.world_size

    @property
    def end(self) -> int:
        """The cursor after the last step."""
        optim = self.job.optim
        return optim.steps * self.rows_a_step if optim.steps else math.ceil(optim.epochs * len(self.rows))

    @property
    def finished(self) -> bool:
        """Whether no step is left, or the held-out loss has not improved for `optim.patience` evaluations."""
        patience = self.job.optim.patience
        return self.state.cursor >= self.end or (patience is not None and self.state.worse >= patience)

    @property
    def final(self) -> Path:
        """The folder of the trained weights."""
        return self.job.output / kind(self.job)

    def record(self) -> dict[str, Any]:
        """The content of training.json: everything that led to the weights."""
        return {
            "job": self.job.model_dump(mode="json"),
            "base_model": {"path": str(self.job.model), "revision": self.setup.verified.revision},
            "tokenizer": self.setup.verified.tokenizer, "setup": asdict(self.setup), "ran": self.evidence,
            "versions": versions(), **asdict(self.state),
        }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """The outcome of a step; the same on all ranks, times aside."""

    cursor: int  # before the step
    loss: float
    lr: float
    norm: float  # of all gradients, before clipping
    norms: Norms | None  # by kind of layer, where they were measured
    tokens: float  # without padding
    seconds: float
    cpu_seconds: float
    stopping: bool  # some rank was asked to stop
    save_due: bool  # the last save was too long ago


def versions() -> dict[str, str]:
    """The installed versions of the libraries that compute."""
    by_package = {"torch": torch.__version__}
    for name in ("transformers", "peft", "deepspeed", "bitsandbytes", "safetensors"):
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:
            continue
    return by_package
