"""`llm-serve fit`: whether a model fits in memory, from its config.json alone and without torch.

Parameter counts are those of transformers 5.23. Weights are counted as bitsandbytes stores them in the engines
(llmcore/quantization.py); the KV cache holds 16-bit numbers, as in these engines and in vLLM.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmcore.config import ConfigError
from llmcore.model_config import read
from llmcore.sizes import gib, parse_memory

DENSE = ("llama", "mistral", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v3")  # MLA: one compressed vector in the cache per token and layer; MoE
RESERVED = 0.1  # share of the memory for activations, the runtime and fragmentation
# Bytes per weight that bitsandbytes quantizes, and bytes per row of them: int8 stores a float32 scale per row, nf4 one per
# 64 weights.
CHANGED = {"none": (2.0, 0), "int8": (1.0, 4), "nf4": (0.5 + 4 / 64, 0)}


@dataclass(frozen=True)
class Model:
    """The relevant facts about an architecture. `changed`: number of weights that bitsandbytes quantizes, in `rows` rows."""

    model_type: str
    parameters: int
    changed: int
    rows: int
    context: int
    cache_bytes_per_token: int
    cache_heads: int  # tensor parallelism divides the cache by this number at most

    def weight_bytes(self, quantization: str) -> int:
        """Bytes of all weights in memory."""
        each, row = CHANGED[quantization]
        return int((self.parameters - self.changed) * 2 + self.changed * each + self.rows * row)


@dataclass(frozen=True)
class Mode:
    """One way to run a model on `gpus` GPUs with `memory` bytes each."""

    quantization: str
    weight_bytes: int
    cache_tokens: int
    contexts: int
    fits: bool
    verdict: str


# How GPUs divide weights: none of them, by tensor parallelism, by it up to the number of key-value heads, experts, and the
# experts that every token passes.
Division = Literal["whole", "tensor", "heads", "experts", "shared"]


@dataclass(frozen=True)
class Part:
    """Weights of a layer that GPUs divide in one way, and whether they are quantized: vLLM quantizes all that bitsandbytes does,
    and more."""

    weights: int
    division: Division
    rows: int = 0
    quantized_by: Literal["", "vllm", "bitsandbytes"] = ""


class Config:
    """config.json by field, with the defaults that published files rely on."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Raises ConfigError for an unsupported architecture."""
        self.content = content
        self.model_type = content.get("model_type")
        if self.model_type not in DENSE + LATENT:
            architectures = ", ".join(DENSE + LATENT)
            raise ConfigError(f"config.json has model_type {self.model_type!r}: fit supports {architectures}")

    def number(self, name: str, default: int | None = None) -> int:
        """A non-negative integer; raises ConfigError if it is missing or invalid."""
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 0:
            raise ConfigError(
                f"config.json has {name} {value!r}: a {self.model_type} model needs a non-negative integer there"
            )
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.content.get(name, default))


@dataclass(frozen=True)
class Architecture:
    """A model by its layers, of which the first `plain` are dense."""

    config: Config
    hidden: int
    layers: int
    plain: int
    dense: tuple[Part, ...]
    sparse: tuple[Part, ...]
    vocabulary: int
    tied: bool
    context: int
    cache_bytes: int  # per token and layer
    cache_heads: int


def linear(
    width: int, height: int, bias: bool = False, division: Division = "tensor", from_inputs: bool = False
) -> list[Part]:
    """A Linear layer from `width` to `height`. One divided by its inputs (`from_inputs`) has its whole bias everywhere."""
    weight = Part(width * height, division, height, "bitsandbytes")
    return [weight, Part(height, "whole" if from_inputs else division)] if bias else [weight]


def grouped_attention(config: Config) -> list[Part]:
    """The parts of a layer's attention with keys and values by head."""
    hidden, heads, groups, size = head_sizes(config)
    bias = config.flag("attention_bias")
    inner = bias or config.model_type == "qwen2"
    parts = [
        *linear(hidden, heads * size, inner),
        *linear(hidden, groups * size, inner, "heads"),
        *linear(hidden, groups * size, inner, "heads"),
        *linear(heads * size, hidden, bias, from_inputs=True),
    ]
    if config.model_type == "qwen3":
        parts.append(Part(2 * size, "whole"))  # norms of query and key
    return parts


def head_sizes(config: Config) -> tuple[int, int, int, int]:
    """The hidden size, the numbers of heads and of key-value heads, and the size of a head."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    size = config.number("head_dim", 128 if config.model_type == "qwen3" else hidden // max(heads, 1))
    return hidden, heads, config.number("num_key_value_heads", heads), size


def latent_attention(config: Config) -> list[Part]:
    """The parts of a layer's attention, for MLA."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    latent, rotated = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    plain, value = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    bias = config.flag("attention_bias")
    queries, keys = heads * (plain + rotated), heads * (plain + value)
    parts = [
        *linear(hidden, latent + rotated, bias, "whole"),
        *linear(heads * value, hidden, bias, from_inputs=True),
        Part(latent * keys, "tensor", keys, "vllm"),  # kv_b_proj
        Part(latent, "whole"),
    ]
    if rank := config.number("q_lora_rank", 0):
        return [*parts, *linear(hidden, rank, bias, "whole"), *linear(rank, queries), Part(rank, "whole")]
    return [*parts, *linear(hidden, queries)]


def feed_forward(config: Config, width: int, division: Division = "tensor") -> list[Part]:
    """The gate, up and down projections."""
    hidden, bias = config.number("hidden_size"), config.flag("mlp_bias")
    return [
        *linear(hidden, width, bias, division),
        *linear(hidden, width, bias, division),
        *linear(width, hidden, bias, division, from_inputs=True),
    ]


def experts(config: Config) -> list[Part]:
    """A layer's router, its experts, which are not Linear, and the shared experts."""
    hidden, width = config.number("hidden_size"), config.number("moe_intermediate_size")
    routed = config.number("n_routed_experts")
    shared = feed_forward(config, width * config.number("n_shared_experts"), "shared")
    own = Part(routed * 3 * hidden * width, "experts", routed * (2 * width + hidden), "vllm")
    return [Part(routed * hidden, "whole"), own, *shared]


def architecture_of(content: dict[str, Any]) -> Architecture:
    """Read config.json; raises ConfigError."""
    config = Config(content)
    hidden, layers = config.number("hidden_size"), config.number("num_hidden_layers")
    if config.model_type in LATENT:
        attention = latent_attention(config)
        # The latent and the rotary part of the key, shared by all heads.
        cached, groups = (config.number("kv_lora_rank") + config.number("qk_rope_head_dim")) * 2, 1
        plain = min(config.number("first_k_dense_replace"), layers)
        sparse = experts(config)
    else:
        attention = grouped_attention(config)
        _, _, groups, size = head_sizes(config)
        cached, plain, sparse = 2 * groups * size * 2, layers, []
    attention.append(Part(2 * hidden, "whole"))  # the layer's two norms
    vocabulary, size = config.number("vocab_size"), sparse[0].weights if plain < layers else 1
    if not vocabulary * hidden * layers * cached * size:
        raise ConfigError("config.json has a size of 0: a model has layers, heads, a vocabulary and experts")
    return Architecture(
        config,
        hidden,
        layers,
        plain,
        (*attention, *feed_forward(config, config.number("intermediate_size"))),
        (*attention, *sparse),
        vocabulary,
        config.flag("tie_word_embeddings"),
        config.number("max_position_embeddings"),
        cached,
        groups,
    )


def model_of(content: dict[str, Any]) -> Model:
    """Count the parameters of config.json; raises ConfigError."""
    model = architecture_of(content)
    parts = [*model.dense * model.plain, *model.sparse * (model.layers - model.plain)]
    changed = [part for part in parts if part.quantized_by == "bitsandbytes"]
    embedding = model.vocabulary * model.hidden * (1 if model.tied else 2)
    return Model(
        str(model.config.model_type),
        sum(part.weights for part in parts) + model.hidden + embedding,
        sum(part.weights for part in changed),
        sum(part.rows for part in changed),
        model.context,
        model.cache_bytes * model.layers,
        model.cache_heads,
    )


def modes(model: Model, memory: int, gpus: int, context: int) -> list[Mode]:
    """Every quantization on `gpus` GPUs with `memory` bytes each, for requests of `context` tokens."""
    return [mode(model, quantization, memory, gpus, context) for quantization in CHANGED]


def mode(model: Model, quantization: str, memory: int, gpus: int, context: int) -> Mode:
    weights = model.weight_bytes(quantization)
    room = int(memory * (1 - RESERVED)) - weights // gpus
    # Heads are distributed over the GPUs; a latent, or the heads if there are too few, is replicated on each of them.
    cached = model.cache_bytes_per_token / min(gpus, model.cache_heads)
    tokens = max(0, int(room / cached))
    contexts = tokens // context
    if room < 0:
        verdict = (
            f"does not fit: weights of {gib(weights)} on {gpus} × {gib(memory)}, a tenth of which is reserved"
        )
    elif not contexts:
        verdict = (
            f"holds the weights, but the cache of {tokens} tokens is smaller than one context of {context}"
        )
    else:
        verdict = f"fits: {contexts} concurrent contexts of {context} tokens"
    return Mode(quantization, weights, tokens, contexts, contexts > 0, verdict)


def report(
    directory: Path, memory: str, gpus: int, context: int | None, quantization: str | None, as_json: bool
) -> tuple[str, bool]:
    """The report, and whether `quantization` fits, or any if it is None; raises ConfigError."""
    model = model_of(read(directory))
    length = context or model.context
    if length < 1 or gpus < 1:
        raise ConfigError(f"--context is {length} and --gpus is {gpus}: both must be at least 1")
    if quantization not in (None, *CHANGED):
        raise ConfigError(f"--quantization is {quantization}: it is counted with --hosts, as vLLM serves it")
    size = parse_memory(memory)
    candidates = modes(model, size, gpus, length)
    fits = any(each.fits for each in candidates if quantization in (None, each.quantization))
    if as_json:
        head = {**asdict(model), "context": length, "memory": size, "gpus": gpus}
        return json.dumps({**head, "modes": [asdict(each) for each in candidates]}), fits
    cards = f"{gpus} × {gib(size)}; the cache takes {model.cache_bytes_per_token} bytes per token"
    lines = [f"{model.model_type}, {model.parameters / 1e9:.2f} G parameters, on {cards}"]
    lines += [f"{each.quantization:5} {gib(each.weight_bytes):>10}  {each.verdict}" for each in candidates]
    return "\n".join(lines), fits
