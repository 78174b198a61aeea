"""Loads the model to train: quantized, with adapters, or partly frozen, as the job says."""

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from llmcore.uncompiled import uncompiled
from llmtrain.exits import Refusal
from llmtrain.job import Job, Lora
from llmtrain.run.setup import Setup
from llmtrain.run.strategies.protocol import DTYPES

disable_progress_bar()
# peft reads it by its deprecated name
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)


def stored_dtype(kind: str, strategy: str, precision: str) -> torch.dtype:
    """The dtype of the weights in memory.

    DeepSpeed keeps fp32 copies of trainable parameters itself. FSDP2 needs one dtype for all parameters of a layer, and casts
    when it gathers them. Under DDP only products are cast, so trainable weights are fp32; a frozen base need not be.
    """
    if strategy.startswith("zero") or (strategy == "ddp" and kind == "lora"):
        return DTYPES[precision]
    return torch.float32


def load(job: Job, setup: Setup, device: torch.device) -> Any:
    """The model, its trainable parameters with `requires_grad`. For ZeRO-3 the caller keeps an HfDeepSpeedConfig alive.

    Raises Refusal if adapters cannot be added, ConfigError if most weights would not be quantized.
    """
    method = job.method
    dtype = stored_dtype(method.kind, setup.strategy, setup.precision)
    quantization: dict[str, Any] = {}
    if isinstance(method, Lora) and method.quantize != "none":
        from llmcore import quantization as bits

        quantization = bits.loading(method.quantize, dtype, job.model) | {"device_map": {"": str(device)}}
    model = AutoModelForCausalLM.from_pretrained(
        str(job.model),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
        **quantization,
    )
    if isinstance(method, Lora) and quantization:
        bits.refuse_hardly_quantized(method.quantize, bits.bytes_by_dtype(model), job.model)
    if setup.verified.objective != "sft":
        without_dropout(model)
    if isinstance(method, Lora):
        model = adapted(method, setup, model)
    elif not method.train_router:
        freeze_routers(model)
    if setup.checkpointing:
        # The non-reentrant kind mistakes recomputed tensors of gathered, frozen weights for others (DeepSpeed #8130).
        reentrant = setup.strategy == "zero3" and method.kind == "lora"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if method.kind == "lora":
            model.enable_input_require_grads()
    return model.train()


def without_dropout(model: Any) -> None:
    """Preferences compare the model with itself before training, which dropout would blur. TRL leaves it out, too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def adapted(method: Lora, setup: Setup, model: Any) -> Any:
    """The model with an adapter on every layer that `method.target` selects; raises Refusal if some got none."""
    with uncompiled():
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if method.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=setup.checkpointing)
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout if setup.verified.objective == "sft" else 0.0,
        target_modules=setup.targets,
        task_type="CAUSAL_LM",
    )
    # DDP trains adapters in fp32; DeepSpeed has its own fp32 copies, and needs one dtype.
    model = get_peft_model(model, config, autocast_adapter_dtype=setup.strategy == "ddp")
    got = sum(name.endswith("lora_A.default") for name, _ in model.named_modules())
    if got != setup.adapters:
        raise Refusal(
            f"method.target {method.target} selects {setup.adapters} layers, but {got} got an adapter: name other targets"
        )
    return model


def freeze_routers(model: Any) -> None:
    """Freeze the routers of a mixture of experts: trained without a balance loss, they send ever more tokens to a few experts."""
    for part in model.modules():
        children = dict(part.named_children())
        if "experts" in children and "gate" in children:
            children["gate"].requires_grad_(False)
