"""`llm-serve fit`, compared with the counts of transformers and with existing GPUs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import TINY_LATENT, V25

from llmcore.config import ConfigError
from llmcore.sizes import parse_memory
from llmserve.cli import main
from llmserve.engine.memory_fit import Model, mode, model_of

G = 2**30
LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_13B = {
    **LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
SMOLLM2_135M = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
TINY_DENSE = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", TINY_DENSE),
        ("llama", {**TINY_DENSE, "tie_word_embeddings": True, "head_dim": 24}),
        ("llama", {**TINY_DENSE, "attention_bias": True, "mlp_bias": True}),
        ("mistral", TINY_DENSE),
        ("qwen2", TINY_DENSE),
        ("qwen3", TINY_DENSE),
        ("deepseek_v2", TINY_LATENT),
        ("deepseek_v2", {**TINY_LATENT, "q_lora_rank": None}),
        ("deepseek_v2", {**TINY_LATENT, "attention_bias": True, "first_k_dense_replace": 0}),
        ("deepseek_v3", TINY_LATENT),
        ("deepseek_v3", {**TINY_LATENT, "tie_word_embeddings": True, "attention_bias": True}),
    ],
)
def test_parameters_and_cache_are_those_of_transformers(family: str, fields: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    counted = model_of(json.loads(config.to_json_string()))
    assert counted.parameters == sum(each.numel() for each in model.parameters())
    linears = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    changed = [part for name, part in linears.items() if not name.endswith(("lm_head", "kv_b_proj"))]
    assert counted.changed == sum(part.weight.numel() for part in changed)
    assert counted.rows == sum(part.out_features for part in changed)
    layers = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values.layers
    held = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert counted.cache_bytes_per_token * 3 == held * 2  # in 16 bit


def fits(model: Model, quantization: str, memory: int, gpus: int = 1, context: int = 4096) -> int:
    """Number of concurrent contexts; 0 if the model does not fit."""
    return mode(model, quantization, memory, gpus, context).contexts


def test_a_13b_model_fits_24_gb_in_int8_and_not_in_16_bit() -> None:
    model = model_of(LLAMA_13B)
    assert model.parameters == 13_015_864_320
    assert fits(model, "none", 24 * G) == 0
    assert "does not fit: weights of 24.2 GiB" in mode(model, "none", 24 * G, 1, 4096).verdict
    assert 12 * G < model.weight_bytes("int8") < 13 * G
    assert model.cache_bytes_per_token == 819_200
    assert fits(model, "int8", 24 * G) == 2
    assert fits(model, "nf4", 24 * G) == 4


def test_a_7b_model_fits_24_gb_in_16_bit() -> None:
    model = model_of(LLAMA_7B)
    assert model.parameters == 6_738_415_616
    assert fits(model, "none", 24 * G) == 4
    assert fits(model, "none", 12 * G) == 0
    assert fits(model, "int8", 12 * G) == 2


def test_deepseek_v25_needs_eight_gpus_of_80_gb_and_bitsandbytes_hardly_shrinks_it() -> None:
    model = model_of(V25)
    assert model.parameters == 235_741_434_880
    assert model.cache_bytes_per_token == 60 * (512 + 64) * 2
    assert fits(model, "none", 80 * G, gpus=8, context=16384) >= 8
    assert fits(model, "none", 80 * G, gpus=6, context=16384) == 0
    assert model.weight_bytes("nf4") > 0.9 * model.weight_bytes("none"), "experts remain in 16 bit"
    # Each of the eight GPUs holds the whole latent, so the cache is not divided.
    halves = mode(model, "none", 80 * G, 8, 1).cache_tokens
    assert halves == int((80 * G * 0.9) // 1 - model.weight_bytes("none") // 8) // model.cache_bytes_per_token


def test_smollm2_is_small() -> None:
    model = model_of(SMOLLM2_135M)
    assert model.parameters == 134_515_008
    assert fits(model, "none", G, context=2048) > 5


def test_the_command_prints_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_13B))
    assert main(["fit", "--model", str(tmp_path), "--memory", "24G"]) == 0
    assert "int8    12.4 GiB  fits: 2 concurrent contexts of 4096 tokens" in capsys.readouterr().out
    assert main(["fit", "--model", str(tmp_path), "--memory", "6G", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [each["fits"] for each in answer["modes"]] == [False, False, False]
    assert (answer["memory"], answer["gpus"], answer["context"]) == (6 * G, 1, 4096)


def test_the_exit_code_reflects_the_requested_quantization(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_13B))
    command = ["fit", "--model", str(tmp_path), "--memory", "24G", "--quantization"]
    assert [main([*command, quantization]) for quantization in ("none", "int8", "nf4")] == [1, 0, 0]


def test_fit_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    arguments = ["fit", "--model", str(tmp_path), "--memory", "24G"]
    code = f"import sys; from llmserve.cli import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is not a model configuration"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "mamba"}', "model_type 'mamba': fit supports llama"),
        ("{}", "model_type None"),
        (json.dumps({**LLAMA_7B, "hidden_size": "big"}), "hidden_size 'big'"),
        (json.dumps({**LLAMA_7B, "num_hidden_layers": -1}), "num_hidden_layers -1"),
        (json.dumps({**V25, "kv_lora_rank": None}), "kv_lora_rank None"),
        (json.dumps({**V25, "n_routed_experts": 0}), "has a size of 0"),
        (json.dumps({**LLAMA_7B, "num_attention_heads": 0}), "has a size of 0"),
    ],
)
def test_an_invalid_config_json_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, complaint: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["fit", "--model", str(tmp_path), "--memory", "24G"]) == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_model_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model", str(tmp_path / "none"), "--memory", "24G"]) == 2
    assert "specify a model directory" in capsys.readouterr().err


def test_memory_must_be_a_size() -> None:
    assert parse_memory("24G") == parse_memory("24GiB") == parse_memory("24gb") == 24 * G
    assert parse_memory("0.5g") == G // 2
    for wrong in "", "G", "many", "-5G", "nan", "inf":
        with pytest.raises(ConfigError, match="--memory"):
            parse_memory(wrong)
