"""Train a model for a few steps on the CPU in this process, and print measured and planned memory as JSON.

    python measured_step.py MODEL_DIR lora|full SEQ_LEN MICRO_BATCH yes|no   (the last: activation checkpointing)

Weights, gradients and optimizer states are summed over the tensors; the activations of a forward pass are summed over
what autograd saves; the peak is that of the process's resident memory (VmHWM, which Linux allows a process to reset),
above its value before the model was loaded. The rows are random tokens in two packed documents: memory does not
depend on the content.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# glibc retains small freed blocks. With this, blocks above 64 KiB are returned at once, so that resident means in use.
if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606  the same program; glibc reads it at startup

import torch
from transformers import AutoModelForCausalLM

from llmtrain.job import Job
from llmtrain.planning.architecture import describe, lora_targets
from llmtrain.planning.hardware import G, Hardware
from llmtrain.planning.plan import plan


def resident(key: str) -> int:
    """Bytes of this process: VmRSS is the current value, VmHWM the maximum since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def total(tensors: Any) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def kept_by(model: Any, batch: dict[str, Any]) -> int:
    """Bytes that autograd saves in a forward pass without a loss, excluding weights."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    held: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    kept = total(held.values())
    del output
    return kept


def main(directory: Path, method: str, seq_len: int, micro_batch: int, checkpointing: bool) -> None:
    """Plan, train two steps of two micro-batches, and print."""
    scale = {
        "micro_batch": micro_batch,
        "tokens_per_step": 2 * micro_batch * seq_len,
        "checkpointing": checkpointing,
    }
    described = {
        "name": "measured", "model": directory, "method": {"kind": method}, "data": {"train": directory},
        "output": directory, "scale": {**scale, "strategy": "ddp"}, "optim": {"steps": 3, "precision": "fp32"},
    }  # fmt: skip
    job = Job.model_validate(described)
    planned = plan(job, Hardware("cpu", 1, 64 * G, 64 * G), seq_len)
    torch.set_num_threads(1)
    torch.nn.functional.scaled_dot_product_attention(
        *torch.randn(3, 1, 1, 64, 64, requires_grad=True)
    ).sum().backward()
    before = resident("VmRSS")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        targets = lora_targets(describe(directory), "attention.qv")
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=targets)
        model = get_peft_model(model, config)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (micro_batch, seq_len))
    positions = torch.cat([torch.arange(seq_len // 2)] * 2).expand(micro_batch, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    Path("/proc/self/clear_refs").write_text("5")
    gradients = 0
    for _ in range(2):
        for _ in range(2):
            model(**batch, use_cache=False).loss.backward()
        gradients = total([each.grad for each in learning])
        optimizer.step()
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    measured = {
        "weights": total(model.parameters()),
        "gradients": gradients,
        "optimizer": total(states),
        "peak": resident("VmHWM") - before,
        "activations": kept_by(model, batch),
    }
    parts = {name: round(size * G) for name, size in planned.parts.items()}
    parts["peak"] = sum(parts.values()) - parts["overhead"]
    print(json.dumps({"planned": parts, "measured": measured}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "yes")
