"""Weights in 8 or 4 bits by bitsandbytes, and the check that they were really quantized.

It saves memory, and more often than not costs time: measurements in docs/develop/performance.md.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from llmcore.config import ConfigError
from llmcore.model_config import Quantization

# It logs a cast of inputs for every matrix product, a thousand times per second.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
KERNEL_ROWS, KERNEL_COLUMNS = 32, 64  # block size of its 4-bit kernel for CPUs


def loading(
    quantization: Quantization, dtype: torch.dtype, directory: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Extra arguments for from_pretrained; empty without quantization."""
    if quantization == "none":
        return {}
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    exceptions = left_alone(model, quantization)
    eight = {"load_in_8bit": True}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    how = BitsAndBytesConfig(**(eight if quantization == "int8" else four), llm_int8_skip_modules=exceptions)
    return {"quantization_config": how, "device_map": {"": device}}


def left_alone(model: Any, quantization: Quantization) -> list[str]:
    """Names of the layers to leave unquantized.

    The head, for quality; MLA's kv_b_proj, because transformers passes it a shape that the 8-bit product does not
    support; and matrices whose shape the 4-bit kernel for CPUs cannot divide.
    """
    layers = {"lm_head", "kv_b_proj"}
    if quantization == "nf4":
        layers |= {
            name.rpartition(".")[2]
            for name, part in model.named_modules()
            if isinstance(part, torch.nn.Linear)
            and (part.out_features % KERNEL_ROWS or part.in_features % KERNEL_COLUMNS)
        }
    return sorted(layers)


def bytes_by_dtype(model: Any) -> dict[str, int]:
    """Bytes of all weights by dtype."""
    sizes: Counter[str] = Counter()
    for weight in model.parameters():
        sizes[str(weight.dtype).removeprefix("torch.")] += weight.numel() * weight.element_size()
    return dict(sizes)


def refuse_hardly_quantized(quantization: Quantization, sizes: dict[str, int], directory: Path) -> None:
    """Raise ConfigError if more than half of the weights were not quantized: experts, for one, are not Linear layers."""
    if quantization == "none":
        return
    bits = 8 if quantization == "int8" else 4
    small = sum(size * 8 // bits for dtype, size in sizes.items() if dtype in ("int8", "uint8"))
    wide = sum(
        size // getattr(torch, dtype).itemsize
        for dtype, size in sizes.items()
        if dtype not in ("int8", "uint8")
    )
    if wide > small:
        share = round(100 * wide / (wide + small))
        listed = ", ".join(f"{size} bytes of {dtype}" for dtype, size in sorted(sizes.items()))
        raise ConfigError(
            f"quantization '{quantization}' leaves {share} % of the weights of {directory} at 16 bit or more ({listed}): "
            "bitsandbytes quantizes neither experts nor matrices that its kernels cannot divide; set quantization 'none', "
            "or serve it with vLLM"
        )
