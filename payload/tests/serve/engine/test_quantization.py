"""Weights in 8 and 4 bits: what shrinks, what does not, and which models are refused because they would not shrink."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from models import TINY_LATENT
from tiny import make_tokenizer

from llmcore.config import ConfigError
from llmserve.engine.memory_fit import model_of
from llmserve.protocol import Generate
from llmserve.settings import ContinuousModel, NaiveModel

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
pytest.importorskip("bitsandbytes", reason="the payload's extra 'quantization' is not installed")

from llmcore import quantization  # noqa: E402 - needs torch
from llmserve.engine.continuous import ContinuousDriver  # noqa: E402
from llmserve.engine.language_model import LanguageModel  # noqa: E402
from llmserve.engine.naive import NaiveDriver  # noqa: E402

LLAMA = {
    "vocab_size": 448, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# Sizes that the 4-bit kernel can divide; two experts, or so many that they dominate.
LATENT = {
    **TINY_LATENT, "vocab_size": 448, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 2,
    "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 2, "n_shared_experts": 8, "max_position_embeddings": 512,
}  # fmt: skip


def made(directory: Path, family: str, fields: dict[str, Any]) -> Path:
    """A random model of this kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(directory)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def naive(path: Path, how: str, **change: Any) -> NaiveModel:
    """A model in an engine's configuration."""
    fields = {"driver": "naive", "path": path, "manifest": path, "threads": 1, "quantization": how, **change}
    return NaiveModel(**fields)


def logits(language: LanguageModel) -> Any:
    """Logits of one prompt."""
    with torch.no_grad():
        return language.model(torch.tensor([[5, 77, 300, 12, 9, 250, 41, 8]])).logits.float()


@pytest.mark.parametrize(("how", "error"), [("int8", 0.05), ("nf4", 0.8)])
@pytest.mark.parametrize(
    ("family", "fields"), [("llama", LLAMA), ("deepseek_v2", LATENT), ("deepseek_v3", LATENT)]
)
def test_a_quantized_model_has_the_estimated_size_and_answers_alike(
    tmp_path: Path, family: str, fields: dict[str, Any], how: Any, error: float
) -> None:
    path = made(tmp_path, family, fields)
    whole = LanguageModel(naive(path, "none", dtype="float32"), "r")
    small = LanguageModel(naive(path, how), "r")
    sizes = quantization.bytes_by_dtype(small.model)
    model = model_of(json.loads((path / "config.json").read_text()))
    # bitsandbytes stores them beside the weights.
    scales = model.rows * 4 if how == "int8" else model.changed // 16
    assert sum(sizes.values()) + scales == model.weight_bytes(how)
    assert sizes["int8" if how == "int8" else "uint8"] == model.changed // (1 if how == "int8" else 2)
    assert (logits(small) - logits(whole)).abs().max() < error * logits(whole).abs().max()
    assert small.revision == f"r-bfloat16-{how}"


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_both_drivers_answer_alike_with_quantized_weights(tmp_path: Path, how: Any) -> None:
    path = made(tmp_path, "llama", LLAMA)
    settings = naive(path, how, dtype="float32", context=256)
    request = Generate(0, False, 12, prompt="what is the capital", temperature=0)
    continuous = ContinuousDriver(
        ContinuousModel(**settings.model_dump(exclude={"device"}) | {"driver": "continuous"}), "r"
    )
    answers: list[str] = []
    try:
        for driver in NaiveDriver(settings, "r"), continuous:

            async def answer(driver: Any = driver) -> str:
                pieces: list[str] = []
                await driver.generate(request, pieces.append)
                await asyncio.sleep(0)
                return "".join(pieces)

            answers.append(asyncio.run(answer()))
    finally:
        continuous.stop()
    assert answers[0] == answers[1]


def test_layers_that_the_4_bit_kernel_cannot_divide_are_not_quantized(tmp_path: Path) -> None:
    path = made(tmp_path, "llama", {**LLAMA, "hidden_size": 256, "intermediate_size": 72})
    small = LanguageModel(naive(path, "nf4"), "r")
    kinds = Counter(type(part).__name__ for part in small.model.modules() if "Linear" in type(part).__name__)
    assert kinds == {"Linear4bit": 4 * 4, "Linear": 4 * 3 + 1}
    assert torch.isfinite(logits(small)).all()


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantization_that_leaves_out_the_experts_is_refused(tmp_path: Path, how: str) -> None:
    path = made(tmp_path, "deepseek_v2", {**LATENT, "n_routed_experts": 32})
    with pytest.raises(
        ConfigError, match=rf"'{how}' leaves \d\d % of the weights .* bytes of bfloat16.*experts"
    ):
        NaiveDriver(naive(path, how), "r")
    LanguageModel(naive(path, "none"), "r")


def test_without_bitsandbytes_the_error_names_the_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path, "llama", LLAMA)
    monkeypatch.setattr("llmserve.engine.unsupported_models.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes and accelerate.*\[quantization\]"):
        LanguageModel(naive(path, "nf4"), "r")


def test_a_gpu_that_is_configured_and_not_there_is_refused(tmp_path: Path) -> None:
    assert not torch.cuda.is_available()
    with pytest.raises(
        ConfigError, match=r"device is 'cuda', but torch .* sees no GPU: check NVIDIA's driver"
    ):
        NaiveDriver(naive(made(tmp_path, "llama", LLAMA), "none", device="cuda"), "r")
