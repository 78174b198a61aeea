"""`llm-serve fit`: will this model run there? From its config.json alone, without torch.

The numbers of parameters are those that transformers 5.23 counts. Weights are what bitsandbytes makes of them in the
engines (llmserve/quantization.py); the cache holds 16-bit numbers, as here and in vLLM.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcore.config import ConfigError
from llmcore.model_config import read
from llmcore.sizes import gib, parse_memory

DENSE = ("llama", "mistral", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v3")  # cache one compressed vector a token and layer (MLA); experts (MoE)
RESERVED = 0.1  # of the memory: activations, the runtime's own, fragments
# Bytes of a weight that bitsandbytes changes, and bytes for each of its rows: int8 keeps a float32 scale a row,
# nf4 one for 64 weights.
CHANGED = {"none": (2.0, 0), "int8": (1.0, 4), "nf4": (0.5 + 4 / 64, 0)}


@dataclass(frozen=True)
class Model:
    """What matters of an architecture. `changed` weights, in `rows`, are those that bitsandbytes changes."""

    model_type: str
    parameters: int
    changed: int
    rows: int
    context: int
    cache_bytes_per_token: int
    cache_heads: int  # tensor parallelism divides the cache by no more than these

    def weight_bytes(self, quantization: str) -> int:
        """All of them, in memory."""
        each, row = CHANGED[quantization]
        return int((self.parameters - self.changed) * 2 + self.changed * each + self.rows * row)


@dataclass(frozen=True)
class Mode:
    """One way to run a model on `gpus` of `memory` bytes each."""

    quantization: str
    weight_bytes: int
    cache_tokens: int
    contexts: int
    fits: bool
    verdict: str


class Config:
    """config.json, field by field, with the defaults that files on the hub rely on."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Raises ConfigError for an architecture that nobody has counted."""
        self.content = content
        self.model_type = content.get("model_type")
        if self.model_type not in DENSE + LATENT:
            known = ", ".join(DENSE + LATENT)
            raise ConfigError(f"config.json has model_type {self.model_type!r}: fit knows {known}")

    def number(self, name: str, default: int | None = None) -> int:
        """A count; raises ConfigError where it is missing or no count."""
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 0:
            raise ConfigError(
                f"config.json has {name} {value!r}: a {self.model_type} model needs a number there"
            )
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch."""
        return bool(self.content.get(name, default))


def linear(width: int, height: int, bias: bool = False) -> tuple[int, int, int]:
    """Weights, rows, and what is not changed of a layer from `width` to `height`."""
    return width * height, height, height if bias else 0


def total(parts: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Their sums."""
    return sum(part[0] for part in parts), sum(part[1] for part in parts), sum(part[2] for part in parts)


def grouped_attention(config: Config) -> tuple[list[tuple[int, int, int]], int, int]:
    """A layer's parts, the bytes it caches for a token, and its key and value heads."""
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
    """The same, for MLA: the cache holds the latent and the rotated part of the key, once for all heads."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    latent, rotated = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    plain, value = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    bias = config.flag("attention_bias")
    queries = heads * (plain + rotated)
    parts = [linear(hidden, latent + rotated, bias), linear(heads * value, hidden, bias)]
    parts.append((0, 0, latent + latent * heads * (plain + value)))  # kv_b_proj and its norm stay as they are
    if rank := config.number("q_lora_rank", 0):
        parts += [linear(hidden, rank, bias), linear(rank, queries), (0, 0, rank)]
    else:
        parts.append(linear(hidden, queries))
    return parts, (latent + rotated) * 2, 1


def feed_forward(config: Config, width: int) -> list[tuple[int, int, int]]:
    """Gate, up and down."""
    hidden, bias = config.number("hidden_size"), config.flag("mlp_bias")
    return [linear(hidden, width, bias), linear(hidden, width, bias), linear(width, hidden, bias)]


def experts(config: Config) -> list[tuple[int, int, int]]:
    """A layer's router, its experts, which are no Linear and so stay as they are, and the shared ones."""
    hidden, width = config.number("hidden_size"), config.number("moe_intermediate_size")
    routed = config.number("n_routed_experts")
    shared = feed_forward(config, width * config.number("n_shared_experts"))
    return [(0, 0, routed * hidden + routed * 3 * hidden * width), *shared]


def model_of(content: dict[str, Any]) -> Model:
    """Count; raises ConfigError."""
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
    """Every quantization on `gpus` times `memory` bytes, for requests of `context` tokens each."""
    return [mode(model, quantization, memory, gpus, context) for quantization in CHANGED]


def mode(model: Model, quantization: str, memory: int, gpus: int, context: int) -> Mode:
    """One of them."""
    weights = model.weight_bytes(quantization)
    room = int(memory * (1 - RESERVED)) - weights // gpus
    # Heads are shared out to the GPUs; a latent, or a head too few, is held by each of them.
    cached = model.cache_bytes_per_token / min(gpus, model.cache_heads)
    tokens = max(0, int(room / cached))
    contexts = tokens // context
    if room < 0:
        verdict = f"does not fit: weights of {gib(weights)} on {gpus} × {gib(memory)}, of which a tenth is kept free"
    elif not contexts:
        verdict = f"holds the weights, but {tokens} tokens of cache are less than one context of {context}"
    else:
        verdict = f"fits: {contexts} contexts of {context} tokens at once"
    return Mode(quantization, weights, tokens, contexts, contexts > 0, verdict)


def report(
    directory: Path, memory: str, gpus: int, context: int | None, quantization: str | None, as_json: bool
) -> tuple[str, bool]:
    """The answer, and whether that quantization fits, or any where none is named; raises ConfigError."""
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
    cards = f"{gpus} × {gib(size)}; a token of cache takes {model.cache_bytes_per_token} bytes"
    lines = [f"{model.model_type}, {model.parameters / 1e9:.2f} G parameters, on {cards}"]
    lines += [f"{each.quantization:5} {gib(each.weight_bytes):>10}  {each.verdict}" for each in found]
    return "\n".join(lines), fits
