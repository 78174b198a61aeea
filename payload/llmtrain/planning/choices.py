"""The ways to run a job: all that the job allows, those that fit, and what would fit otherwise."""

from collections.abc import Iterator
from dataclasses import replace

from llmcore.sizes import gib
from llmtrain.exits import Refusal
from llmtrain.job import Lora
from llmtrain.planning.footprint import Choice, Load, counted, footprint, host_bytes, room
from llmtrain.planning.hardware import G

OFFLOADS = ("none", "optimizer", "all")
TOKENS = 16384  # largest micro-batch; matrix units are saturated well below
TOKENS_CPU = 2048


def choices(load: Load, rows_per_rank: int) -> Iterator[Choice]:
    """Every reasonable way to run the job that it allows."""
    scale, hardware, method = load.job.scale, load.hardware, load.job.method
    quantized = method.kind == "lora" and method.quantize != "none"
    if scale.strategy != "auto":
        strategies: tuple[str, ...] = (scale.strategy,)
    elif quantized or (hardware.world_size == 1 and hardware.on_cpu):
        strategies = ("ddp",)
    elif method.kind == "lora":
        strategies = ("ddp", "zero3")  # ZeRO-2 shards gradients and moments, of which LoRA has few
    else:
        strategies = ("ddp", "zero2", "zero3")
    limit = max(1, (TOKENS_CPU if hardware.on_cpu else TOKENS) // load.seq_len)
    sizes = [size for size in range(1, rows_per_rank + 1) if rows_per_rank % size == 0 and size <= limit]
    for strategy in strategies:
        for offload in offloads(load, strategy):
            for checkpointing in (
                (False, True) if scale.checkpointing == "auto" else (bool(scale.checkpointing),)
            ):
                for size in (scale.micro_batch,) if scale.micro_batch else sizes:
                    yield Choice(strategy, offload, checkpointing, size)


def offloads(load: Load, strategy: str) -> Iterator[str]:
    """The kinds of offloading that a strategy supports and the job allows; raises Refusal if the job asks for another."""
    scale, hardware = load.job.scale, load.hardware
    possible = {"zero2": OFFLOADS[:2], "zero3": OFFLOADS}.get(strategy, OFFLOADS[:1])
    if hardware.on_cpu:
        possible = OFFLOADS[:1]
    if scale.strategy != "auto" and scale.offload not in ("auto", *possible):
        raise Refusal(
            f"scale.offload is {scale.offload}, which {strategy} on {hardware.gpu} does not support: use {' or '.join(possible)}"
        )
    for offload in possible:
        # On a single process ZeRO shards nothing: it only pays off for offloading.
        idle = (
            hardware.world_size == 1 and strategy != "ddp" and offload == "none" and scale.strategy == "auto"
        )
        if scale.offload in ("auto", offload) and not idle:
            yield offload


def fits(load: Load, choice: Choice) -> bool:
    """Whether a choice fits in the memory of the GPU, and its offloaded part in that of the host."""
    return sum(footprint(load, choice).values()) <= room(load.hardware) and not host_lacks(load, choice)


def host_lacks(load: Load, choice: Choice) -> float:
    """Bytes by which offloading exceeds four fifths of a node's memory."""
    return max(0, host_bytes(load, choice) - 0.8 * load.hardware.host_memory)


def smallest(load: Load, among: list[Choice]) -> float | None:
    """The smallest footprint of any of them on a GPU, in bytes."""
    return min((sum(footprint(load, choice).values()) for choice in among), default=None)


def what_would_fit(load: Load) -> list[str]:
    """Changes of the job or of the hardware, each of which alone would make the job fit."""
    job, hardware, method = load.job, load.hardware, load.job.method
    left_open = {"strategy": "auto", "offload": "auto", "checkpointing": "auto", "micro_batch": None}
    free = replace(load, job=job.model_copy(update={"scale": job.scale.model_copy(update=left_open)}))
    changes = []
    if free.job != job and room_for(free):
        changes.append("scale.strategy, offload, checkpointing and micro_batch set to auto")
    if not hardware.on_cpu:
        for world in (hardware.world_size * 2**power for power in range(1, 7)):
            gpus = min(world, max(hardware.gpus, 8))
            host = hardware.host_memory // hardware.gpus * gpus
            more = replace(hardware, gpus=gpus, nodes=-(-world // gpus), host_memory=host)
            if room_for(replace(free, hardware=more)):
                changes.append(f"{more.world_size} such GPUs")
                break
    for size in (size for size in (24, 40, 48, 80, 96, 140, 180) if size * G > hardware.memory):
        if room_for(replace(free, hardware=replace(hardware, memory=size * G))):
            changes.append(f"{size} GiB on each")
            break
    host = hardware.host_memory
    if room_for(replace(free, hardware=replace(hardware, host_memory=1024 * host))):
        while not room_for(replace(free, hardware=replace(hardware, host_memory=host))):
            host += 256 * G
        changes.append(f"nodes with {gib(host)} of memory for offloading")
    if method.kind == "full":
        lora = job.model_copy(update={"method": Lora(kind="lora"), "scale": free.job.scale})
        if room_for(replace(free, job=lora, activations=counted(load.architecture, lora, load.precision))):
            changes.append("method: {kind: lora}")
    elif method.quantize == "none" and load.architecture.quantizable_share >= 0.5:
        smaller = method.model_copy(update={"quantize": "nf4"})
        if room_for(replace(free, job=free.job.model_copy(update={"method": smaller}))):
            changes.append("method.quantize: nf4")
    for shorter in (load.seq_len // 2, load.seq_len // 4, load.seq_len // 8):
        if shorter and room_for(replace(free, seq_len=shorter)):
            changes.append(f"rows of {shorter} tokens")
            break
    return changes


def room_for(load: Load) -> bool:
    """Whether any choice fits with a micro-batch of one row."""
    return any(fits(load, choice) for choice in choices(load, 1))
