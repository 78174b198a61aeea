"""`llm-serve fit --hosts N`: how vLLM divides a model over the GPUs of hosts, and how many requests each division holds.

Pure arithmetic from config.json; nothing is loaded, and no GPU is used. Weights and cache of a GPU are those of vLLM 0.32
(payload/tests/serve/engine/vllm_shards.json); activations and runtime are estimates that leave less for the cache than vLLM's
published logs of an 80 GB card show.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmcore.sizes import gib
from llmserve.engine.memory_fit import LATENT, RESERVED, Architecture, Part

# Bytes per quantized weight and per row of them, in vLLM: fp8 has a scale per row at most, awq and gptq a 16-bit scale and a
# zero of 4 bits per group.
GROUP = 128
WEIGHTS = {"none": (2.0, 0), "fp8": (1.0, 4), "int4": (0.5 + 2.5 / GROUP, 0)}
DRIVER = 0.01  # share of a card's memory that its driver keeps: torch sees 79.2 of 80 GiB
# CUDA's context and graphs, and NCCL's buffers where GPUs share a model: vLLM's log has 1.8 GiB on one card of 80 GB and
# 3.6 GiB on each of two.
RUNTIME_ALONE, RUNTIME_SHARED = 2 << 30, 4 << 30
BLOCK = 16  # tokens of the cache that are allocated at once
SEQUENCES = 256  # vLLM's least default of max_num_seqs
LOGIT = (
    40  # bytes a logit in the sampler: 1.26 GiB in vLLM's log for 256 sequences and a vocabulary of 128,256
)


@dataclass(frozen=True)
class Cluster:
    """`hosts` with `gpus` GPUs of `memory` bytes each, which NVLink joins within a host."""

    hosts: int
    gpus: int
    memory: int

    @property
    def usable(self) -> int:
        """Bytes of a GPU that vLLM may take."""
        return int(self.memory * (1 - DRIVER) * (1 - RESERVED))


@dataclass(frozen=True)
class Load:
    """Concurrent requests of `context` tokens each; vLLM computes `batched_tokens` tokens per step."""

    context: int
    concurrency: int
    batched_tokens: int


@dataclass(frozen=True)
class Split:
    """GPUs of one replica: `tensor` share each layer, `pipeline` groups share the layers, and `data` such pipelines have
    requests and attention of their own. With `expert_parallel` tensor x data GPUs have whole experts, else slices of all.
    """

    quantization: str
    tensor: int
    pipeline: int
    data: int = 1
    expert_parallel: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    def options(self, load: Load, sequences: int) -> str:
        """Options of `vllm serve`."""
        words = [f"--tensor-parallel-size {self.tensor}", f"--pipeline-parallel-size {self.pipeline}"]
        if self.data > 1:
            words.append(f"--data-parallel-size {self.data}")
        if self.expert_parallel:
            words.append("--enable-expert-parallel")
        if self.quantization == "fp8":
            words.append("--quantization fp8")
        words.append(f"--max-model-len {load.context} --max-num-batched-tokens {load.batched_tokens}")
        return " ".join([*words, f"--max-num-seqs {sequences} --gpu-memory-utilization {1 - RESERVED}"])


@dataclass(frozen=True)
class Plan:
    """A split on a cluster. Bytes are those of the GPU with the least room for the cache, `requests` those of all replicas.

    `bound` names the limit that keeps it from serving the load, `verdict` says by how much, and `shortfall` is that as a share,
    for memory.
    """

    split: Split
    verdict: str
    bound: str = ""
    shortfall: float = 0.0
    replicas: int = 0
    hosts: int = 0  # of one replica
    weights: int = 0
    activations: int = 0
    runtime: int = 0
    cache: int = 0
    cache_tokens: int = 0  # of one replica
    requests: int = 0
    sequences: int = SEQUENCES

    @property
    def serves(self) -> bool:
        return not self.bound

    @property
    def crosses(self) -> bool:
        """Whether each layer, and not only each stage, sends between hosts."""
        return self.hosts > 1 and (self.split.data > 1 or self.split.tensor * self.hosts > self.split.gpus)

    def rank(self) -> tuple[Any, ...]:
        """A sort key, lower is better: weights as trained, little traffic between hosts, few kinds of parallelism, many
        replicas."""
        split = self.split
        quantization = list(WEIGHTS).index(split.quantization)
        return quantization, self.crosses, self.hosts, split.data, split.pipeline, split.gpus, -self.requests


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage, as vLLM's get_pp_indices: what is left over goes to the last ones but the very last."""
    counts = [layers // stages] * stages
    for index in range(2, layers % stages + 2):
        counts[-index] += 1
    return counts


def shards(part: Part, split: Split, cache_heads: int) -> int:
    """Number of GPUs among which vLLM divides a part."""
    return {
        "whole": 1,
        "tensor": split.tensor,
        "heads": min(split.tensor, cache_heads),
        # With data parallelism each GPU of a tensor group computes other tokens there, so it has all of the weights.
        "shared": split.tensor if split.data == 1 else 1,
        "experts": split.tensor,
    }[part.division]


def local_weights(part: Part, split: Split, model: Architecture) -> int:
    """Number of a part's weights on the first GPU of a stage, which has no fewer than the others."""
    if part.division == "experts" and split.expert_parallel:
        routed = model.config.number("n_routed_experts")
        return part.weights // routed * -(-routed // (split.tensor * split.data))
    return part.weights // shards(part, split, model.cache_heads)


def stage_parts(model: Architecture, split: Split) -> Iterator[tuple[int, int, int, int]]:
    """Dense layers and sparse layers of each stage, and how often it has the vocabulary's matrix and the last norm."""
    first = 0
    for stage, count in enumerate(stage_layers(model.layers, split.pipeline)):
        dense = min(max(model.plain - first, 0), count)
        last = stage == split.pipeline - 1
        tables = 1 if stage == 0 and last and model.tied else (stage == 0) + last
        yield dense, count - dense, tables, int(last)
        first += count


def stage_parameters(model: Architecture, split: Split) -> list[int]:
    """Number of parameters of a GPU in each stage."""
    dense, sparse = (
        sum(local_weights(part, split, model) for part in parts) for parts in (model.dense, model.sparse)
    )
    table = padded(model.vocabulary) // split.tensor * model.hidden
    return [
        dense * plain + sparse * rest + tables * table + norms * model.hidden
        for plain, rest, tables, norms in stage_parts(model, split)
    ]


def part_bytes(part: Part, split: Split, model: Architecture) -> float:
    """Bytes of a part on a GPU."""
    local = local_weights(part, split, model)
    if not part.weights or not part.quantized_by or split.quantization == "none":
        return local * 2
    each, row = WEIGHTS[split.quantization]
    # vLLM computes MLA with a copy of kv_b_proj in 16 bit.
    copy = 2 if part.quantized_by == "vllm" and part.division == "tensor" else 0
    return local * (each + copy) + row * part.rows * local / part.weights


def stage_bytes(model: Architecture, split: Split) -> list[int]:
    """Bytes of the weights of a GPU in each stage."""
    dense, sparse = (
        sum(part_bytes(part, split, model) for part in parts) for parts in (model.dense, model.sparse)
    )
    table = padded(model.vocabulary) // split.tensor * model.hidden
    return [
        int(dense * plain + sparse * rest) + 2 * (tables * table + norms * model.hidden)
        for plain, rest, tables, norms in stage_parts(model, split)
    ]


def padded(vocabulary: int) -> int:
    """Rows of the vocabulary's matrix in vLLM."""
    return -(-vocabulary // 64) * 64


def activation_bytes(model: Architecture, split: Split, load: Load, sequences: int) -> int:
    """The peak besides weights and cache, as in vLLM's profiling run: the maximum of attention, a layer's feed-forward part and
    the sampler, plus the hidden states and the workspaces of experts.
    """
    config, tokens, tensor = model.config, load.batched_tokens, split.tensor
    heads = config.number("num_attention_heads") // tensor
    steady = 3 * tokens * model.hidden * 2
    if config.model_type in LATENT:
        latent, rotated = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
        plain, value = config.number("qk_nope_head_dim"), config.number("v_head_dim")
        # Earlier tokens, which are expanded at once.
        rows = min(max(8 * load.context, 4 * sequences * BLOCK), 64 << 10)
        steady += rows * (latent + rotated) * 2
        inputs = config.number("q_lora_rank", 0) + latent + rotated
        attention = (
            tokens * (heads * (plain + rotated + value) + inputs) * 2 + rows * heads * (plain + value) * 2
        )
    else:
        size = model.cache_bytes // 4 // model.cache_heads
        attention = tokens * 2 * (heads + max(model.cache_heads // tensor, 1)) * size * 2
    width = config.number("intermediate_size") // tensor
    if model.plain < model.layers:
        expert = config.number("moe_intermediate_size") // (1 if split.expert_parallel else tensor)
        chosen = tokens * split.data * config.number("num_experts_per_tok")
        steady += 2 * chosen * max(model.hidden, 2 * expert) * 2 + tokens * split.data * model.hidden * 2
    return steady + max(attention, tokens * 3 * width * 2, sequences * model.vocabulary * LOGIT)


def indivisible(model: Architecture, split: Split, cluster: Cluster) -> tuple[str, str] | None:
    """The bound that a split breaks before memory counts: a sentence, and its name."""
    config, tensor = model.config, split.tensor
    if (lack := split.gpus - cluster.hosts * cluster.gpus) > 0:
        return f"needs {split.gpus} GPUs, {lack} more than are available", "gpus"
    if (lack := split.pipeline - model.layers) > 0:
        return f"{model.layers} layers leave {lack} of {split.pipeline} stages empty", "layers"
    heads, groups = config.number("num_attention_heads"), model.cache_heads
    sizes = [("heads", f"{heads} attention heads", heads)]
    if groups > 1 and groups >= tensor:
        sizes.append(("key-value heads", f"{groups} key-value heads", groups))
    sizes.append(("vocabulary", f"a vocabulary of {padded(model.vocabulary)}", padded(model.vocabulary)))
    if model.plain:
        width = config.number("intermediate_size")
        sizes.append(("width", f"a feed-forward width of {width}", width))
    if model.plain < model.layers:
        routed, expert = config.number("n_routed_experts"), config.number("moe_intermediate_size")
        if split.expert_parallel:
            if (lack := tensor * split.data - routed) > 0:
                return f"{routed} experts leave {lack} of {tensor * split.data} GPUs without one", "experts"
        else:
            sizes.append(("experts", f"an expert's width of {expert}", expert))
        if split.data == 1:
            shared = expert * config.number("n_shared_experts")
            sizes.append(("experts", f"a width of {shared} of the shared experts", shared))
    for bound, name, size in sizes:
        if size % tensor:
            return f"{name} among {tensor} GPUs: {size % tensor} left over", bound
    if tensor % groups and tensor > groups > 1:
        return f"{tensor} GPUs among {groups} key-value heads: {tensor % groups} left over", "key-value heads"
    return uneven_groups(model, split)


def declared_quantization(model: Architecture) -> dict[str, Any]:
    """quantization_config of config.json, empty for weights that are not quantized."""
    content = model.config.content.get("quantization_config")
    return content if isinstance(content, dict) else {}


def uneven_groups(model: Architecture, split: Split) -> tuple[str, str] | None:
    """The same for weights that are quantized in groups of inputs, none of which two GPUs can share."""
    declared = declared_quantization(model)
    blocks = declared.get("weight_block_size")
    group = {
        "int4": declared.get("group_size", GROUP),
        "fp8": blocks[0] if isinstance(blocks, list) and blocks else 1,
    }.get(split.quantization, 1)
    if type(group) is not int or group < 1:
        return None
    widths = {"a feed-forward layer": model.config.number("intermediate_size")} if model.plain else {}
    if model.plain < model.layers and not split.expert_parallel:
        widths["an expert"] = model.config.number("moe_intermediate_size")
    for name, width in widths.items():
        local = width // split.tensor
        if local % group:
            sentence = f"{local} inputs of {name} on each GPU in groups of {group}: {local % group} left over"
            return sentence, "quantization groups"
    return None


def placement(split: Split, cluster: Cluster) -> tuple[int, int] | None:
    """Hosts of a replica, the fewest that hold as many of its GPUs each, and the number of replicas; None if there is none.

    Tensor groups lie within a host if it is large enough for one.
    """
    for hosts in range(1, cluster.hosts + 1):
        each = split.gpus // hosts
        if split.gpus % hosts or each > cluster.gpus:
            continue
        if each % split.tensor == 0 if split.tensor <= cluster.gpus else split.tensor % each == 0:
            return hosts, cluster.hosts // hosts * (cluster.gpus // each)
    return None


def amount(size: float) -> str:
    """A difference in memory, in MiB if it is small."""
    return gib(size) if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


def plan(model: Architecture, split: Split, cluster: Cluster, load: Load) -> Plan:
    """The capacity of a split on a cluster, or the bound that it breaks."""
    if fault := indivisible(model, split, cluster):
        return Plan(split, *fault)
    place = placement(split, cluster)
    if place is None:
        groups = f"{split.gpus} GPUs in groups of {split.tensor}"
        return Plan(
            split, f"{groups}: no number of hosts up to {cluster.hosts} has as many on each", "placement"
        )
    hosts, replicas = place
    sequences = max(SEQUENCES, -(-load.concurrency // (replicas * split.data)))
    activations = activation_bytes(model, split, load, sequences)
    runtime = RUNTIME_SHARED if split.gpus > 1 else RUNTIME_ALONE
    each = model.cache_bytes // min(split.tensor, model.cache_heads)
    free = cluster.usable - activations - runtime
    stages = zip(stage_bytes(model, split), stage_layers(model.layers, split.pipeline), strict=True)
    # vLLM gives every stage as many blocks as the one with the least room holds.
    blocks, weights, layers = min(
        ((free - weights) // (BLOCK * each * layers), weights, layers) for weights, layers in stages
    )
    room, tokens = free - weights, max(blocks, 0) * BLOCK
    requests = tokens // BLOCK // -(-load.context // BLOCK) * split.data * replicas
    if room < 0:
        bound, lack = "weights", -room / cluster.usable
        verdict = (
            f"weights of {gib(weights)}, activations of {gib(activations)} and a runtime of {gib(runtime)} exceed the "
            f"{gib(cluster.usable)} of a GPU by {amount(-room)}"
        )
    elif not requests:
        bound, lack = "cache", 1 - tokens / load.context
        missing = load.context - tokens
        verdict = (
            f"{gib(room)} of cache on a GPU hold {tokens} tokens, {missing} fewer than a request has: "
            f"{amount(missing * each * layers)} too little"
        )
    elif requests < load.concurrency:
        bound, lack = "concurrency", 1 - requests / load.concurrency
        verdict = f"serves {requests} of {load.concurrency} requests, {load.concurrency - requests} too few"
    else:
        bound, lack, verdict = "", 0.0, f"serves {requests} requests"
    sizes = weights, activations, runtime, max(room, 0), tokens * split.data
    return Plan(split, verdict, bound, lack, replicas, hosts, *sizes, requests, sequences)


def splits(
    model: Architecture, cluster: Cluster, quantization: str, tensor: int | None, pipeline: int | None
) -> Iterator[Split]:
    """Splits over at most all GPUs, with `tensor` and `pipeline` as specified. Experts are kept whole on a GPU if they cannot be
    sliced, and with data parallelism.
    """
    total = cluster.hosts * cluster.gpus
    for across in [tensor] if tensor else range(1, total + 1):
        for stages in [pipeline] if pipeline else range(1, max(total // across, 1) + 1):
            single = Split(quantization, across, stages)
            yield single
            if model.plain < model.layers:
                if indivisible(model, single, cluster):
                    yield Split(quantization, across, stages, 1, True)
                for data in range(2, total // (across * stages) + 1):
                    yield Split(quantization, across, stages, data, True)


def ranking(
    model: Architecture, cluster: Cluster, load: Load, quantizations: list[str], tensor: int | None = None,
    pipeline: int | None = None,
) -> list[Plan]:  # fmt: skip
    """Plans for all splits, best first; those that do not serve the load come last, ordered by how many requests they serve."""
    every = [
        plan(model, split, cluster, load)
        for quantization in quantizations
        for split in splits(model, cluster, quantization, tensor, pipeline)
    ]
    return sorted(
        every, key=lambda each: (not each.serves, 0 if each.serves else -each.requests, *each.rank())
    )
