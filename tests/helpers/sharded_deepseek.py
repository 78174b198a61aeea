"""A random DeepSeek-V2 of three shards in the form of DeepSeek's repositories, code and pickles included; no torch needed.

`python tests/helpers/sharded_deepseek.py FOLDER 512 64` writes one with the only sizes of latent heads that vLLM takes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, FEED, EXPERT, EXPERTS, HEADS, RANK, QUERY, NOPE, ROPE, VALUE = 32, 48, 24, 4, 4, 8, 16, 8, 8, 8
VOCABULARY = 260
CODE = "raise SystemExit('code of a repository was run')\n"
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "model_type": "deepseek_v2",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "moe_intermediate_size": EXPERT,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "kv_lora_rank": RANK,
    "q_lora_rank": QUERY,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
CARD = "---\nlicense: other\nlicense_name: deepseek\nlicense_link: https://example.com/LICENSE-MODEL\n---\n# A tiny model\n"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LICENCE = "DEEPSEEK LICENSE AGREEMENT\n\nUse it well.\n"
NOT_TAKEN = {  # what real repositories carry besides
    "modeling_deepseek.py": CODE,
    "configuration_deepseek.py": CODE,
    "pytorch_model.bin": "cos\nsystem\n(S'false'\ntR.",
    "figures/accuracy.png": "\x89PNG\r\n",
    ".gitattributes": "*.safetensors filter=lfs\n",
}


def write(folder: Path, scale: int = 1, rank: int = RANK, rope: int = ROPE) -> Path:
    """Write the repository's files; returns the folder. `scale` widens the vocabulary's matrices, and so the outer shards."""
    folder.mkdir(parents=True)
    config = CONFIG | {"vocab_size": VOCABULARY * scale, "kv_lora_rank": rank, "qk_rope_head_dim": rope}
    shards = [
        {"model.embed_tokens.weight": (VOCABULARY * scale, HIDDEN), **_layer(0, rank, rope)},
        _layer(1, rank, rope),
        {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY * scale, HIDDEN)},
    ]
    random = np.random.default_rng(0)
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-0000{number}-of-00003.safetensors"
        save_file(
            {tensor: random.normal(0, 0.05, shape).astype(np.float32) for tensor, shape in shapes.items()},
            folder / name,
            {"format": "pt"},
        )
        index |= dict.fromkeys(shapes, name)
    _write(folder / "config.json", config)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    _write(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    _write(folder / "tokenizer.json", _tokenizer())
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"},
    )
    plain = {"README.md": CARD, "LICENSE-MODEL": LICENCE, "chat_template.jinja": CHAT, **NOT_TAKEN}
    for name, text in plain.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _layer(number: int, rank: int, rope: int) -> dict[str, tuple[int, ...]]:
    attention = {
        "q_a_proj.weight": (QUERY, HIDDEN),
        "q_a_layernorm.weight": (QUERY,),
        "q_b_proj.weight": (HEADS * (NOPE + rope), QUERY),
        "kv_a_proj_with_mqa.weight": (rank + rope, HIDDEN),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (HEADS * (NOPE + VALUE), rank),
        "o_proj.weight": (HIDDEN, HEADS * VALUE),
    }
    feeds = {"mlp": FEED} if number == 0 else {f"mlp.experts.{each}": EXPERT for each in range(EXPERTS)}
    if number:
        feeds["mlp.shared_experts"] = EXPERT
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}": shape for name, shape in attention.items()}
    for name, width in feeds.items():
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, HIDDEN)
        shapes[f"{name}.down_proj.weight"] = (HIDDEN, width)
    if number:
        shapes["mlp.gate.weight"] = (EXPERTS, HIDDEN)
    shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (HIDDEN,)
    return {f"model.layers.{number}.{name}": shape for name, shape in shapes.items()}


def _tokenizer() -> dict[str, Any]:
    """Bytes as tokens: GPT-2's letters for them, without merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": "<bos>", **flags}, {"id": 257, "content": "<eos>", **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in letters.items()} | {"<bos>": 256, "<eos>": 257},
            "merges": [],
        },
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]), 1, *map(int, sys.argv[2:]))
