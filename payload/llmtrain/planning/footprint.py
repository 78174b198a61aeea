"""The memory of a training step on each process, by arithmetic.

Bytes per parameter follow ZeRO (Rajbhandari et al. 2020): AdamW in mixed precision keeps a 16-bit weight and gradient,
and a 32-bit weight and two moments, 16 bytes in all; each stage shards more of them over the processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from llmtrain.job import Job
from llmtrain.planning.activations import Activations, activations
from llmtrain.planning.architecture import Architecture, adapter_parameters, lora_targets
from llmtrain.planning.hardware import G, Hardware

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "gather", "overhead")
BUCKET = 50_000_000  # elements that DeepSpeed communicates at once
SMALL = 100_000  # ZeRO-3 does not shard parameters with fewer elements: norms, and LoRA's matrices
# Bytes per weight that bitsandbytes quantizes, and bytes per row of such a matrix: as in llm-serve fit.
QUANTIZED = {"int8": (1.0, 4), "nf4": (0.5 + 4 / 64, 0)}


@dataclass(frozen=True)
class Choice:
    """One way to run the job."""

    strategy: str
    offload: str
    checkpointing: bool
    micro_batch: int

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded over the processes."""
        return self.strategy in ("zero3", "fsdp")


@dataclass(frozen=True)
class Load:
    """The part of the work that does not depend on the choice."""

    architecture: Architecture
    job: Job
    hardware: Hardware
    seq_len: int
    precision: str
    activations: Activations

    @property
    def number(self) -> int:
        """Bytes of a number in the precision of the job."""
        return 4 if self.precision == "fp32" else 2

    @cached_property
    def targets(self) -> list[str] | None:
        """LoRA's layers; None for full fine-tuning."""
        return (
            lora_targets(self.architecture, self.job.method.target)
            if self.job.method.kind == "lora"
            else None
        )

    @cached_property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        method = self.job.method
        if method.kind == "lora":
            return adapter_parameters(self.architecture, self.targets or [], method.r)
        frozen = 0 if method.train_router else self.architecture.router_parameters
        return self.architecture.parameters - frozen

    @cached_property
    def frozen_bytes(self) -> float:
        """Bytes of the frozen weights in memory."""
        method, a = self.job.method, self.architecture
        if method.kind == "full":
            return (a.parameters - self.trainable) * 4.0  # a router is kept in 32 bit
        if method.quantize == "none":
            return float(a.parameters * self.number)
        each, row = QUANTIZED[method.quantize]
        rest = (a.parameters - a.quantizable_parameters) * 4  # PEFT casts the rest to 32 bit
        return rest + a.quantizable_parameters * each + a.quantizable_rows * row


def counted(architecture: Architecture, job: Job, precision: str) -> Activations:
    """The activations of each token in this job. Takes seconds."""
    method = job.method
    if method.kind == "full":
        return activations(architecture, None, precision)
    targets = lora_targets(architecture, method.target)
    return activations(architecture, targets, precision, method.r, method.dropout)


def footprint(load: Load, choice: Choice) -> dict[str, float]:
    """Peak bytes on each process, by part of PARTS."""
    world, number, learn = load.hardware.world_size, load.number, load.trainable
    full = load.job.method.kind == "full"
    share = world if choice.sharded else 1
    if choice.strategy in ("ddp", "fsdp"):
        # 32-bit weights that autocast copies; DDP sends gradients from separate buckets. FSDP2 needs one dtype in
        # a layer, so LoRA's frozen weights are of 32 bit there.
        copies = number if full and number < 4 and choice.strategy == "ddp" else 0
        frozen = (
            load.architecture.parameters * 4 if choice.strategy == "fsdp" and not full else load.frozen_bytes
        )
        weights = frozen / share + learn * 4 / share + learn * copies
        gradients = learn * 4 / share * (2 if choice.strategy == "ddp" and world > 1 else 1)
        optimizer = learn * 8 / share
    else:
        whole = 0 if full else learn * number  # LoRA's matrices are too small to be sharded
        weights = (load.frozen_bytes + (learn * number if full else 0)) / share + whole
        gradients, optimizer = learn * number / world, learn * 12 / world
    if choice.offload != "none":
        gradients = optimizer = 0
    if choice.offload == "all":
        weights = 0 if full else learn * number
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    parts |= working_memory(load, choice)
    # ZeRO casts its share of the gradients to 32 bit when it updates, after the activations are gone.
    update = 4 * learn / world if choice.strategy.startswith("zero") and choice.offload == "none" else 0
    parts["optimizer"] += max(0, update - parts["activations"] - parts["logits"] - parts["gather"])
    return {name: float(parts[name]) for name in PARTS}


def working_memory(load: Load, choice: Choice) -> Mapping[str, float]:
    """Bytes that are only allocated during a step."""
    per_token, a, number = load.activations, load.architecture, load.number
    tokens = choice.micro_batch * load.seq_len
    # A packed row's mask, as numbers to add to the scores, is kept by attention without a kernel for documents. On a CPU
    # torch has no kernel for keys and values of two sizes (MLA) and keeps the scores of each head.
    mask = scores = choice.micro_batch * load.seq_len**2 * number
    if load.hardware.on_cpu and a.latent:
        mask = scores * a.heads
    # The loss: logits as computed, as log-probabilities in 32 bit, and two gradients of that size.
    logits = tokens * a.vocabulary * (number + 12)
    # The backward pass of a layer holds about four more of its widest tensors, after the loss has freed its memory: the
    # larger of the two counts. Measured, see docs/use/training-plan.md.
    backward = 4 * tokens * a.widest * number + (mask if mask > scores else 0)
    if choice.checkpointing:
        again = backward + tokens * max(per_token.layers) + mask
        activation_bytes = tokens * (per_token.boundary * a.layers + per_token.outside) + max(
            0, again - logits
        )
    else:
        activation_bytes = (
            tokens * (sum(per_token.layers) + per_token.outside) + mask * a.layers + max(0, backward - logits)
        )
    return {
        "activations": activation_bytes,
        "logits": logits,
        "gather": gathered(load, choice),
        "overhead": overhead(load.hardware),
    }


def live_parameters(architecture: Architecture) -> int:
    """Parameters that ZeRO-3 holds unsharded at once: those of the running module and of the next."""
    ahead = prefetch(architecture)
    return architecture.largest_unit + (ahead + architecture.largest_parameter if ahead else 0)


def prefetch(architecture: Architecture) -> int:
    """Parameters to prefetch; none for experts, whose next layer is as large as the running one."""
    return 0 if architecture.expert_parameters else BUCKET


def gathered(load: Load, choice: Choice) -> float:
    """Bytes of weights that are unsharded temporarily, and of communication buckets."""
    a, number = load.architecture, load.number
    full = load.job.method.kind == "full"
    if load.hardware.world_size == 1 and choice.offload == "none":
        return 0
    if choice.strategy == "fsdp":
        return number * (2 * a.largest_layer + a.outside_layers) + (4 * a.largest_layer if full else 0)
    buckets = 2 * number * min(BUCKET, load.trainable) if choice.strategy.startswith("zero") else 0
    if choice.strategy == "zero3":
        return buckets + number * (live_parameters(a) + (a.largest_unit if full else 0))
    return buckets


def overhead(hardware: Hardware) -> float:
    """Bytes of the runtime: CUDA's context and workspaces and NCCL's buffers; on a CPU, the libraries."""
    if hardware.on_cpu:
        return 0.7 * G
    return 1.0 * G + (0.5 * G if hardware.world_size > 1 else 0)


def host_bytes(load: Load, choice: Choice) -> float:
    """Bytes that offloading allocates in a node's memory."""
    if choice.offload == "none":
        return 0
    nodes, learn = load.hardware.nodes, load.trainable
    states = learn * (load.number + 4 + 12) / nodes
    if choice.offload == "optimizer":
        return states
    return (
        states + (load.frozen_bytes + (learn * load.number if load.job.method.kind == "full" else 0)) / nodes
    )


def room(hardware: Hardware) -> float:
    """Usable bytes: a twentieth of a GPU's memory is lost to fragmentation; a tenth of a host's is the system's."""
    return hardware.memory * (0.9 if hardware.on_cpu else 0.95)
