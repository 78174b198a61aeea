"""The plan of a job: how it runs, its memory and its duration.

The memory of every way that the job allows is computed (footprint.py), the speed of those that fit is predicted (speed.py),
and the fastest is chosen; among equally fast ones the simplest. Offloading is only chosen if nothing fits without it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmcore.sizes import gib
from llmtrain.data.rows import Rows
from llmtrain.exits import NO_FIT, Refusal
from llmtrain.job import Job
from llmtrain.planning.architecture import Architecture, describe
from llmtrain.planning.choices import OFFLOADS, choices, fits, host_lacks, smallest, what_would_fit
from llmtrain.planning.footprint import (
    BUCKET,
    SMALL,
    Choice,
    Load,
    counted,
    footprint,
    host_bytes,
    live_parameters,
    prefetch,
    room,
)
from llmtrain.planning.hardware import G, Hardware
from llmtrain.planning.speed import describes, tokens_per_second

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Plan:
    """How a job runs. `parts` are GiB on each GPU (on a CPU: in each process), at the peak of a step."""

    strategy: str
    offload: str
    world_size: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    precision: str
    parts: dict[str, float]
    reasons: tuple[str, ...]
    tokens_per_second: float | None  # of all processes; None if there is no published figure to predict from
    hours: float | None  # None if that, or the number of rows, is unknown
    seq_len: int
    memory: float  # GiB of a GPU, of which `room` is usable
    room: float
    leaf_classes: tuple[str, ...]
    live_parameters: int
    prefetch: int

    @property
    def total(self) -> float:
        """The sum of `parts` in GiB."""
        return sum(self.parts.values())


class NoFit(Refusal):
    """The job does not fit. `nearest` is the plan that exceeds the memory least, `would_fit` lists changes that would help."""

    def __init__(self, nearest: Plan, would_fit: list[str], host_lacks: float) -> None:
        """`host_lacks` is the number of bytes missing in the memory of a host."""
        self.nearest, self.would_fit = nearest, would_fit
        parts = ", ".join(f"{name} {size:.1f}" for name, size in nearest.parts.items() if size >= 0.05)
        host = f", and {gib(host_lacks)} more than the memory of a node" if host_lacks else ""
        ways = "; ".join(would_fit) or "no change that was tried: use a smaller model, or more or larger GPUs"
        super().__init__(
            f"does not fit: {how(nearest)} takes {nearest.total:.1f} GiB on each of {nearest.world_size} × "
            f"{nearest.memory:.0f} GiB, of which {nearest.room:.1f} is usable ({parts}){host}; what would fit: {ways}",
            NO_FIT,
        )


def plan(
    job: Job,
    hardware: Hardware,
    seq_len: int | None = None,
    rows: int | None = None,
    architecture: Architecture | None = None,
) -> Plan:
    """The plan of `job` on `hardware`.

    `seq_len` and `rows` default to those of the job's data set, `architecture` to that of its model. Raises NoFit, or
    Refusal for settings that cannot work on any hardware like this: batch sizes, precision, quantization.
    """
    if seq_len is None:
        data = Rows(job.data.train)
        seq_len, rows = data.seq_len, len(data)
    architecture = architecture or describe(job.model)
    refuse_the_impossible(job, architecture, seq_len)
    rows_per_rank = share_of_a_step(job, hardware, seq_len)
    numbers = precision(job, hardware)
    load = Load(architecture, job, hardware, seq_len, numbers, counted(architecture, job, numbers))
    every = list(choices(load, rows_per_rank))
    if not every:
        raise Refusal(
            f"scale.offload is {job.scale.offload}, but no strategy for this job on {hardware.gpu} supports offloading: omit it"
        )
    fitting = [choice for choice in every if fits(load, choice)]
    if not fitting:
        nearest = min(
            every, key=lambda choice: (host_lacks(load, choice), sum(footprint(load, choice).values()))
        )
        raise NoFit(
            written(load, nearest, rows_per_rank, rows, []), what_would_fit(load), host_lacks(load, nearest)
        )
    best = min(fitting, key=lambda choice: rank(load, choice, rows_per_rank))
    return written(load, best, rows_per_rank, rows, [choice for choice in every if choice not in fitting])


def precision(job: Job, hardware: Hardware) -> str:
    """The precision of the job, or the best that the hardware supports. Raises Refusal for bf16 on a GPU without it."""
    setting = job.optim.precision
    if setting == "auto":
        return "fp32" if hardware.on_cpu else "bf16" if hardware.bf16 else "fp16"
    if setting == "bf16" and not hardware.bf16 and not hardware.on_cpu:
        raise Refusal(f"optim.precision is bf16, but {hardware.gpu} does not support it: use fp16 or auto")
    return setting


def refuse_the_impossible(job: Job, a: Architecture, seq_len: int) -> None:
    """Raise Refusal for jobs that no amount of memory would make possible."""
    method = job.method
    if a.stored_as == "fp8":
        raise Refusal(f"{job.model} is stored in fp8, which cannot be trained: convert it to bf16 first")
    if seq_len > a.context:
        raise Refusal(
            f"the rows have {seq_len} tokens, but the model's context is {a.context}: pack the data again"
        )
    if method.kind == "lora" and method.quantize != "none" and a.quantizable_share < 0.5:
        raise Refusal(
            f"method.quantize is {method.quantize}, but bitsandbytes would leave {1 - a.quantizable_share:.0%} of this "
            f"{a.family} model in 16 bit (its experts are not Linear layers): omit quantize"
        )


def share_of_a_step(job: Job, hardware: Hardware, seq_len: int) -> int:
    """Rows per process in a step. Raises Refusal if the tokens of a step cannot be divided evenly."""
    tokens, world = job.scale.tokens_per_step, hardware.world_size
    unit = world * seq_len * (job.scale.micro_batch or 1)
    if tokens % unit:
        below, above = tokens // unit * unit, (tokens // unit + 1) * unit
        way = f"{below} or {above}" if below else str(above)
        micro = f" × {job.scale.micro_batch} rows at a time" if job.scale.micro_batch else ""
        raise Refusal(
            f"scale.tokens_per_step is {tokens}, which {world} processes × {seq_len} tokens{micro} = {unit} does not divide: use "
            f"{way}"
        )
    return tokens // (world * seq_len)


def rank(load: Load, choice: Choice, rows_per_rank: int) -> tuple[float, ...]:
    """A sort key; smaller is better: less offloaded, faster by more than 2 %, simpler, fewer micro-batches, in this order."""
    speed = tokens_per_second(load, choice, rows_per_rank // choice.micro_batch)
    return (
        OFFLOADS.index(choice.offload),  # published figures do not predict the speed of a host well
        -round(math.log(speed, 1.02)) if speed else 0,
        STRATEGIES.index(choice.strategy),
        choice.checkpointing,
        -choice.micro_batch,
    )


def written(load: Load, choice: Choice, rows_per_rank: int, rows: int | None, unfit: list[Choice]) -> Plan:
    """The plan that a choice amounts to."""
    job, hardware = load.job, load.hardware
    accumulation = rows_per_rank // choice.micro_batch
    speed = tokens_per_second(load, choice, accumulation)
    if job.optim.steps:
        tokens: float | None = job.optim.steps * job.scale.tokens_per_step
    else:
        tokens = rows * load.seq_len * job.optim.epochs if rows else None
    return Plan(
        strategy=choice.strategy,
        offload=choice.offload,
        world_size=hardware.world_size,
        micro_batch=choice.micro_batch,
        accumulation=accumulation,
        checkpointing=choice.checkpointing,
        precision=load.precision,
        parts={name: size / G for name, size in footprint(load, choice).items()},
        reasons=tuple(reasons(load, choice, unfit)),
        tokens_per_second=speed,
        hours=tokens / speed / 3600 if tokens and speed else None,
        seq_len=load.seq_len,
        memory=hardware.memory / G,
        room=room(hardware) / G,
        leaf_classes=load.architecture.leaf_classes,
        live_parameters=live_parameters(load.architecture),
        prefetch=prefetch(load.architecture),
    )


def reasons(load: Load, choice: Choice, unfit: list[Choice]) -> Iterator[str]:
    """The reasons for a choice, a sentence each."""
    scale, hardware = load.job.scale, load.hardware
    suffix = " (the job asks for it)"
    if scale.strategy != "auto":
        yield f"{choice.strategy}{suffix}"
    else:
        simpler = [
            (strategy, least)
            for strategy in STRATEGIES[: STRATEGIES.index(choice.strategy)]
            if (least := smallest(load, [each for each in unfit if each.strategy == strategy]))
        ]
        if simpler:
            needs = ", ".join(f"{strategy} needs at least {gib(least)}" for strategy, least in simpler)
            yield f"{choice.strategy}: {needs}, and {gib(room(hardware))} of {gib(hardware.memory)} is usable"
        else:
            yield f"{choice.strategy}: the simplest, and nothing that fits is predicted to be faster"
    if choice.offload != "none":
        memory = gib(host_bytes(load, choice))
        yield f"offload {choice.offload}: {memory} of a node's memory" + (
            suffix if scale.offload != "auto" else ""
        )
    if scale.checkpointing == "auto":
        without = smallest(load, [each for each in unfit if not each.checkpointing and same(each, choice)])
        if choice.checkpointing and without:
            yield f"activation checkpointing: without it {gib(without)} at least; it costs about 21 % of the speed"
        elif choice.checkpointing:
            yield "activation checkpointing: it makes room for a larger micro-batch, which sends the weights less often"
        else:
            yield "no activation checkpointing: there is room, and it costs about 21 % of the speed"
    yield f"{load.precision}: " + precision_reason(load)
    spare = room(hardware) - sum(footprint(load, choice).values())
    if 0 <= spare < 0.1 * hardware.memory:
        yield f"tight: {gib(spare)} are left; a longer row or another kernel's workspace may not fit"
    if tokens_per_second(load, choice, 1) is None:
        yield "no speed prediction: there is no published figure for this hardware; the first steps will show it"
    else:
        yield describes(load, choice)


def precision_reason(load: Load) -> str:
    """The reason for the precision."""
    if load.job.optim.precision != "auto":
        return "the job asks for it"
    if load.hardware.on_cpu:
        return "the default on a CPU"
    return (
        "the hardware has it" if load.hardware.bf16 else f"{load.hardware.gpu} has no bf16; losses are scaled"
    )


def same(one: Choice, other: Choice) -> bool:
    """Whether two choices have the same strategy and offload."""
    return (one.strategy, one.offload) == (other.strategy, other.offload)


def how(plan: Plan) -> str:
    """A short description of a plan."""
    words = [plan.strategy, f"micro-batch {plan.micro_batch} × {plan.seq_len} tokens"]
    words += [f"offload {plan.offload}"] if plan.offload != "none" else []
    words += ["activation checkpointing"] if plan.checkpointing else []
    return ", ".join(words)


def deepspeed_config(plan: Plan, job: Job) -> dict[str, Any]:
    """The DeepSpeed configuration of a plan with strategy zero2 or zero3; raises ValueError for another.

    It contains no "auto". The optimizer is torch's own fused AdamW: DeepSpeed's needs a compiler on the host.
    """
    if plan.strategy not in ("zero2", "zero3"):
        raise ValueError(f"{plan.strategy} does not use DeepSpeed")
    zero: dict[str, Any] = {
        "stage": int(plan.strategy[-1]),
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if plan.strategy == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": plan.prefetch,
            "stage3_max_live_parameters": plan.live_parameters,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": SMALL,
            "stage3_gather_16bit_weights_on_model_save": False,
            "sub_group_size": 1_000_000_000,
        }
        if plan.leaf_classes:
            zero["leaf_module"] = {"classes": list(plan.leaf_classes)}
    if plan.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if plan.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    optim = job.optim
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "gradient_clipping": optim.clip,
        "steps_per_print": 2**31,  # the trainer reports progress itself
        "bf16": {"enabled": plan.precision == "bf16"},
        "fp16": {"enabled": plan.precision == "fp16"},  # dynamic loss scaling
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,
                "fused": True,
                "lr": optim.lr,
                "betas": [optim.beta1, optim.beta2],
                "eps": 1e-8,
                "weight_decay": optim.weight_decay,
            },
        },
    }
