"""LoRA adapters: low-rank matrices for one model's weights, and the proof that they take effect in this model.

Programs are known to load adapters that then change nothing: their layers are named differently in this model, or the
model computes with other weights (MLA) and never reads them. So every weight of an adapter must find its place, and
the adapter must change the logits of a fixed prompt.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmcore.config import ConfigError
from llmcore.uncompiled import uncompiled

try:
    with uncompiled():
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
except ImportError as error:
    raise ConfigError(
        f"adapters need peft and accelerate, and one of them is not installed here ({error.name}): "
        "install llmkeep-payload[adapters], or remove the adapters"
    ) from None

PROMPT_TOKENS = 64  # enough to route tokens to all experts
WEIGHTS = "adapter_model.safetensors"


def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed prompt that spans the vocabulary; shape (1, PROMPT_TOKENS, vocabulary size)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.linspace(0, vocabulary - 1, PROMPT_TOKENS, device=model.device).long().unsqueeze(0)
    with torch.inference_mode():
        result: torch.Tensor = model(prompt).logits
    return result


def place(model: Any, name: str, adapter: Path) -> Any:
    """Attach the adapter directory `adapter` to `model` as `name`; `model` is a plain model or a PeftModel. Returns
    the PeftModel.

    Raises ConfigError if it is not a LoRA adapter, or not one for this model.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"{adapter} is not an adapter ({type(error).__name__}): it needs adapter_config.json and {WEIGHTS}, "
            "as peft's save_pretrained writes them"
        ) from None
    if config.peft_type != "LORA":
        raise ConfigError(f"{adapter} is an adapter of type '{config.peft_type}': only LORA is served")
    try:
        with warnings.catch_warnings(action="ignore"):  # their causes are rejected below
            if isinstance(model, PeftModel):
                model.load_adapter(str(adapter), name)
            else:
                model = PeftModel.from_pretrained(model, str(adapter), name, config=config)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the adapter {adapter} does not fit this model ({first_line(error)}): "
            f"it was trained for '{config.base_model_name_or_path}'; use an adapter for this model"
        ) from None
    placed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if odd := sorted(saved ^ placed):
        raise ConfigError(
            f"of the weights of the adapter {adapter}, {len(saved - placed)} have no place in this model and "
            f"{len(placed - saved)} are missing, such as {odd[0]}: it was trained for '{config.base_model_name_or_path}'"
        )
    return model


def first_line(error: Exception) -> str:
    """The first error: that below the heading of a list by torch, or all of peft's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:300]


def refuse_without_effect(adapter: Path, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raise ConfigError if the adapter leaves the logits of the fixed prompt unchanged, or makes them NaN or
    infinite.
    """
    if torch.equal(before, after):
        raise ConfigError(
            f"the adapter {adapter} does nothing here: the logits of a prompt are the same with and without it. "
            "Its matrices are zero, or too small for the model's dtype: train it, or remove it"
        )
    if not torch.isfinite(after).all():
        raise ConfigError(
            f"with the adapter {adapter} the model's logits are NaN or infinite: train it again"
        )


def merged(model: Any, adapter: Path) -> Any:
    """`model` with the adapter merged into its weights; raises ConfigError."""
    before = logits(model)
    whole = place(model, "merged", adapter).merge_and_unload().eval()
    refuse_without_effect(adapter, before, logits(whole))
    return whole
