"""Random LoRA adapters and a random DeepSeek, saved with their manifests."""

from pathlib import Path
from typing import Any

import pytest
from models import TINY_LATENT
from tiny import make_tokenizer

from llmcore.manifest import write_manifest

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")

QUERY_VALUE = ["q_proj", "v_proj"]
LATENT_LAYERS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
LATENT = {**TINY_LATENT, "vocab_size": 448, "max_position_embeddings": 256}


def saved_adapter(model: Path, folder: Path, targets: list[str] = QUERY_VALUE, **change: Any) -> Path:
    """An adapter of rank 4 for `model`, random unless `change` says otherwise, with its manifest beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(sum(folder.name.encode()))
    wanted = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "task_type": "CAUSAL_LM", **change}
    base: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(target_modules=targets, **wanted))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if name.endswith("bias"):
                weight.fill_(0.1)
    adapted.save_pretrained(str(folder))
    write_manifest(folder, manifest_of(folder))
    return folder


def manifest_of(folder: Path) -> Path:
    """The path of the manifest of a model or an adapter."""
    return folder.parent / f"{folder.name}.sha256"


def latent_model(folder: Path, family: str) -> Path:
    """A random DeepSeek, in fp32, with its manifest."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **LATENT, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_manifest(folder, manifest_of(folder))
    return folder
