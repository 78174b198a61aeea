"""The model to train: loaded, adapted or frozen as the job says, and its tokenizer."""

import logging
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llmtrain.batches import labels
from llmtrain.exits import Refusal
from llmtrain.job import Job, Lora
from llmtrain.rows import Rows, tokenizer_digest
from llmtrain.setup import Setup
from llmtrain.strategies import DTYPES

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # peft brings it, and it misses a kernel of the hub's
disable_progress_bar()


def stored_dtype(kind: str, strategy: str, precision: str) -> torch.dtype:
    """Of the weights in memory.

    DeepSpeed keeps fp32 copies of what learns by itself. FSDP2 takes one dtype for all parameters of a layer, and casts when
    it gathers them. DDP casts products alone, so weights that learn are fp32, and a frozen base need not be.
    """
    if strategy.startswith("zero") or (strategy == "ddp" and kind == "lora"):
        return DTYPES[precision]
    return torch.float32


def load(job: Job, setup: Setup, device: torch.device) -> Any:
    """The model with what learns marked by `requires_grad`; under ZeRO-3 the caller has told transformers before."""
    method = job.method
    dtype = stored_dtype(method.kind, setup.strategy, setup.precision)
    quantization: dict[str, Any] = {}
    if isinstance(method, Lora) and method.quantize != "none":
        from llmserve import quantization as bits

        quantization = bits.loading(method.quantize, dtype, job.model) | {"device_map": {"": str(device)}}
    model = AutoModelForCausalLM.from_pretrained(
        str(job.model),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
        **quantization,
    )
    if quantization:
        bits.refuse_hardly_quantized(method.quantize, bits.bytes_by_dtype(model), job.model)
    if isinstance(method, Lora):
        model = adapted(method, setup, model)
    elif not method.train_router:
        freeze_routers(model)
    if setup.checkpointing:
        # Recomputed tensors of gathered, frozen weights look different to the newer kind (DeepSpeed #8130).
        reentrant = setup.strategy == "zero3" and method.kind == "lora"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if method.kind == "lora":
            model.enable_input_require_grads()
    return model.train()


def adapted(method: Lora, setup: Setup, model: Any) -> Any:
    """The model with adapters on every layer that `method.target` means; raises Refusal if some got none."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if method.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=setup.checkpointing)
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=setup.targets,
        task_type="CAUSAL_LM",
    )
    # DDP learns adapters in fp32; DeepSpeed has its own fp32 copies, and wants one dtype.
    model = get_peft_model(model, config, autocast_adapter_dtype=setup.strategy == "ddp")
    got = sum(name.endswith("lora_A.default") for name, _ in model.named_modules())
    if got != setup.adapters:
        raise Refusal(
            f"method.target {method.target} means {setup.adapters} layers, {got} got an adapter: name other targets"
        )
    return model


def freeze_routers(model: Any) -> None:
    """A mixture of experts trained without a balance loss sends ever more to the same few."""
    for part in model.modules():
        children = dict(part.named_children())
        if "experts" in children and "gate" in children:
            children["gate"].requires_grad_(False)


def check_data(rows: Rows, job: Job) -> None:
    """Raises Refusal for rows that are not for this model, or too long for it, or from which it cannot learn to stop."""
    if (own := tokenizer_digest(job.model)) != rows.tokenizer:
        raise Refusal(
            f"{rows.directory} was packed for the tokenizer {rows.tokenizer[:16]}, {job.model} has {own[:16]}: pack the data "
            "again with this model's"
        )
    config = AutoConfig.from_pretrained(str(job.model), local_files_only=True)
    if rows.seq_len > config.max_position_embeddings:
        raise Refusal(
            f"{rows.directory} has rows of {rows.seq_len} tokens, {job.model} was made for {config.max_position_embeddings}: "
            "pack the data again with shorter rows"
        )


def check_stop(rows: Rows, model: Path) -> None:
    """Raises Refusal unless a token that ends an answer is learned somewhere.

    Many a model never stops because its end was masked like padding (DeepSeek-Coder #163, TRL #1623).
    """
    ends = sorted(stop_tokens(model))
    if any(numpy.isin(labels(row), ends).any() for row in rows):
        return
    raise Refusal(
        f"nowhere in {rows.directory} one of the model's stop tokens {ends} is learned: it would never stop; "
        "pack the data so that each answer's end counts"
    )


def stop_tokens(model: Path) -> set[int]:
    """What ends an answer, says the model's configuration or its tokenizer."""
    from transformers import GenerationConfig

    told: list[Any] = [AutoConfig.from_pretrained(str(model), local_files_only=True).eos_token_id]
    if (model / "generation_config.json").is_file():
        told.append(GenerationConfig.from_pretrained(str(model), local_files_only=True).eos_token_id)
    told.append(AutoTokenizer.from_pretrained(str(model), local_files_only=True).eos_token_id)
    return {
        token for each in told for token in (each if isinstance(each, list) else [each]) if token is not None
    }
