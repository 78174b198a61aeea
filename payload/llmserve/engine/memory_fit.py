"""`llm-serve fit`: whether a model fits in memory, from its config.json alone and without torch.

Parameter counts are those of transformers 5.23. Weights are counted as bitsandbytes stores them in the engines
(llmcore/quantization.py); the KV cache holds 16-bit numbers, as in these engines and in vLLM.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """What matters of an architecture. `changed`: number of weights that bitsandbytes quantizes, in `rows` rows."""

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


class Config:
    """config.json by field, with the defaults that published files rely on."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Raises ConfigError for an unsupported architecture."""
        self.content = content
        self.model_type = content.get("model_type")
        if self.model_type not in DENSE + LATENT:
            known = ", ".join(DENSE + LATENT)
            raise ConfigError(f"config.json has model_type {self.model_type!r}: fit supports {known}")

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


def linear(width: int, height: int, bias: bool = False) -> tuple[int, int, int]:
    """Quantized weights, their rows, and weights left alone, of a layer from `width` to `height`."""
    return width * height, height, height if bias else 0


def total(parts: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    return sum(part[0] for part in parts), sum(part[1] for part in parts), sum(part[2] for part in parts)


def grouped_attention(config: Config) -> tuple[list[tuple[int, int, int]], int, int]:
    """The parts of a layer's attention, the bytes it caches per token, and its number of key-value heads."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    kept = config.number("num_key_value_heads", heads)
    size = config.number("head_dim", 128 if config.model_type == "qwen3" else hidden // max(heads, 1))
    bias = config.flag("attention_bias")
    inner = bias or config.model_type == "qwen2"
    parts = [
        linear(hidden, heads * size, inner),
        linear(hidden, kept * size, inner),
        linear(hidden, kept * size, inner),
        linear(heads * size, hidden, bias),
    ]
    if config.model_type == "qwen3":
        parts.append((0, 0, 2 * size))  # norms of query and key
    return parts, 2 * kept * size * 2, kept


def latent_attention(config: Config) -> tuple[list[tuple[int, int, int]], int, int]:
    """As grouped_attention, for MLA: the cache holds the latent and the rotary part of the key, shared by all heads."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    latent, rotated = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    plain, value = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    bias = config.flag("attention_bias")
    queries = heads * (plain + rotated)
    parts = [linear(hidden, latent + rotated, bias), linear(heads * value, hidden, bias)]
    # kv_b_proj and its norm are not quantized.
    parts.append((0, 0, latent + latent * heads * (plain + value)))
    if rank := config.number("q_lora_rank", 0):
        parts += [linear(hidden, rank, bias), linear(rank, queries), (0, 0, rank)]
    else:
        parts.append(linear(hidden, queries))
    return parts, (latent + rotated) * 2, 1


def feed_forward(config: Config, width: int) -> list[tuple[int, int, int]]:
    """The gate, up and down projections."""
    hidden, bias = config.number("hidden_size"), config.flag("mlp_bias")
    return [linear(hidden, width, bias), linear(hidden, width, bias), linear(width, hidden, bias)]


def experts(config: Config) -> list[tuple[int, int, int]]:
    """A layer's router, its experts, which are not Linear and hence not quantized, and the shared experts."""
    hidden, width = config.number("hidden_size"), config.number("moe_intermediate_size")
    routed = config.number("n_routed_experts")
    shared = feed_forward(config, width * config.number("n_shared_experts"))
    return [(0, 0, routed * hidden + routed * 3 * hidden * width), *shared]


def model_of(content: dict[str, Any]) -> Model:
    """Count the parameters of config.json; raises ConfigError."""
    config = Config(content)
    hidden, layers = config.number("hidden_size"), config.number("num_hidden_layers")
    latent = config.model_type in LATENT
    attention, cached, heads = (latent_attention if latent else grouped_attention)(config)
    plain = min(config.number("first_k_dense_replace"), layers) if latent else layers
    changed, rows, kept = total(attention)
    kept += 2 * hidden  # the layer's two norms
    changed, rows, kept = changed * layers, rows * layers, kept * layers
    width = config.number("intermediate_size")
    for count, parts in (
        (plain, feed_forward(config, width)),
        (layers - plain, experts(config) if latent else []),
    ):
        more = total(parts)
        changed, rows, kept = changed + count * more[0], rows + count * more[1], kept + count * more[2]
    vocabulary = config.number("vocab_size") * hidden
    kept += hidden + vocabulary * (1 if config.flag("tie_word_embeddings") else 2)
    return Model(
        str(config.model_type),
        changed + kept,
        changed,
        rows,
        config.number("max_position_embeddings"),
        cached * layers,
        heads,
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
    size = parse_memory(memory)
    found = modes(model, size, gpus, length)
    fits = any(each.fits for each in found if quantization in (None, each.quantization))
    if as_json:
        head = {**asdict(model), "context": length, "memory": size, "gpus": gpus}
        return json.dumps({**head, "modes": [asdict(each) for each in found]}), fits
    cards = f"{gpus} × {gib(size)}; the cache takes {model.cache_bytes_per_token} bytes per token"
    lines = [f"{model.model_type}, {model.parameters / 1e9:.2f} G parameters, on {cards}"]
    lines += [f"{each.quantization:5} {gib(each.weight_bytes):>10}  {each.verdict}" for each in found]
    return "\n".join(lines), fits
