"""The state of a training: what a checkpoint holds besides tensors, and what a rank works with."""

import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmtrain.data.rows import Rows
from llmtrain.job import Job
from llmtrain.run.checkpoint import Checkpoints
from llmtrain.run.health import Health, Norms
from llmtrain.run.report import Report
from llmtrain.run.setup import Setup, kind
from llmtrain.run.strategies.protocol import Strategy


@dataclass(kw_only=True)
class TrainingState:
    """The progress of a job: in each checkpoint, and in training.json. Steps are keys of JSON objects, so they are strings."""

    step: int = 0  # that was taken last
    cursor: int = 0  # rows that all ranks together have taken
    losses: dict[str, float] = field(default_factory=dict)  # by step
    evaluations: dict[str, float] = field(default_factory=dict)  # the loss on held-out rows, by step
    best: float | None = None  # of the evaluations
    worse: int = 0  # evaluations since the best one
    resumed: list[dict[str, Any]] = field(default_factory=list)  # step, world_size and what was lost
    data: list[str]  # digests of the data sets
    job_digest: str
    world_size: int


@dataclass
class Training:
    """One rank of a running job."""

    job: Job
    setup: Setup
    device: torch.device
    rows: Rows
    held_out: Rows | None
    strategy: Strategy
    evidence: dict[str, Any]  # of the strategy, from all ranks
    checkpoints: Checkpoints
    report: Report
    health: Health
    state: TrainingState
    saved_at: float  # time.monotonic() of the last save

    @property
    def rows_a_step(self) -> int:
        """Rows that all ranks take in a step."""
        return self.setup.micro_batch * self.setup.accumulation * self.strategy.world_size

    @property
    def end(self) -> int:
        """Where the cursor stands after the last step."""
        optim = self.job.optim
        return optim.steps * self.rows_a_step if optim.steps else math.ceil(optim.epochs * len(self.rows))

    @property
    def finished(self) -> bool:
        """Whether no step is left, or the loss on held-out rows has not improved for too long."""
        patience = self.job.optim.patience
        return self.state.cursor >= self.end or (patience is not None and self.state.worse >= patience)

    @property
    def final(self) -> Path:
        """The folder of the trained weights."""
        return self.job.output / kind(self.job)

    def record(self) -> dict[str, Any]:
        """training.json: how the weights came about."""
        return {
            "job": self.job.model_dump(mode="json"),
            "base_model": {"path": str(self.job.model), "revision": self.setup.verified.revision},
            "tokenizer": self.setup.verified.tokenizer, "setup": asdict(self.setup), "ran": self.evidence,
            "versions": versions(), **asdict(self.state),
        }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What a rank knows after a step; all but `norms` and `cpu_seconds` is the same on all ranks."""

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
    """The installed versions of what computes."""
    found = {"torch": torch.__version__}
    for name in ("transformers", "peft", "deepspeed", "bitsandbytes", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
