"""The settings of a job on this hardware: those of the job, and those that the plan decides."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from llmtrain.exits import Refusal
from llmtrain.job import Job
from llmtrain.planning.architecture import describe, lora_targets, matching
from llmtrain.planning.hardware import Hardware
from llmtrain.planning.plan import Plan, deepspeed_config, plan
from llmtrain.run.input_checks import Verified

MATTERS = (
    "model",
    "method",
    "data",
    "optim",
    "seed",
    "preference",
)  # sections of a job that must not change before it is resumed


@dataclass(frozen=True)
class Setup:
    """The settings that each process gets."""

    strategy: str
    precision: str
    micro_batch: int  # rows
    accumulation: int  # micro-batches of a process in a step
    checkpointing: bool  # of activations
    targets: list[str]  # layers to adapt by LoRA
    adapters: int  # number of adapted layers
    deepspeed: dict[str, Any] | None  # the DeepSpeed configuration, for ZeRO
    verified: Verified
    active_parameters: int  # of the model, for one token
    peak_flops: float | None  # of one GPU, by its data sheet
    traffic: str | None  # between nodes: "esp" or "clear"; None for a single node


def set_up(
    job: Job, hardware: Hardware, verified: Verified, traffic: str | None = None
) -> tuple[Plan, Setup]:
    """The plan of a job, and the settings that follow from it; raises Refusal if it cannot run."""
    architecture = describe(job.model)
    chosen = plan(job, hardware, architecture=architecture)
    refuse_fsdp(chosen, hardware)
    targets = lora_targets(architecture, job.method.target) if job.method.kind == "lora" else []
    deepspeed = None
    if chosen.strategy.startswith("zero"):
        # Nodes share no disk: the first rank of each node writes the files that DeepSpeed writes once.
        deepspeed = deepspeed_config(chosen, job) | {"checkpoint": {"use_node_local_storage": True}}
    return chosen, Setup(
        strategy=chosen.strategy,
        precision=chosen.precision,
        micro_batch=chosen.micro_batch,
        accumulation=chosen.accumulation,
        checkpointing=chosen.checkpointing,
        targets=targets,
        adapters=len(matching(architecture, targets)),
        deepspeed=deepspeed,
        verified=verified,
        active_parameters=architecture.active_parameters,
        peak_flops=hardware.card.teraflops * 1e12 if hardware.card else None,
        traffic=traffic,
    )


def refuse_fsdp(chosen: Plan, hardware: Hardware) -> None:
    """Raise Refusal if FSDP2 cannot run the job."""
    if chosen.strategy != "fsdp":
        return
    if chosen.precision == "fp16":
        raise Refusal(
            "scale.strategy fsdp has no loss scaling for fp16: use optim.precision bf16, or zero2 or zero3"
        )
    if hardware.on_cpu and torch.__version__ < "2.7":  # TorchVersion: compared as a version
        raise Refusal(
            f"FSDP2 does not run on a CPU in torch {torch.__version__}: use zero3, or torch 2.7 or later"
        )


def kind(job: Job) -> str:
    """The folder of the trained weights: "adapter" or "model"."""
    return "adapter" if job.method.kind == "lora" else "model"


def job_digest(job: Job) -> str:
    """The sha256 of the sections in MATTERS, in hex."""
    sections = {
        name: value
        for name, value in job.model_dump(mode="json").items()
        if name in MATTERS and value is not None
    }
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()
