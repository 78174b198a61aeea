"""Export of trained weights: `adapter/` or `model/` with tokenizer and `training.json`, and a manifest beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llmcore.manifest import write_manifest
from llmtrain.job import Job
from llmtrain.run.strategies.protocol import Strategy

TOKENIZER = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def export(job: Job, strategy: Strategy, folder: Path, record: dict[str, Any]) -> None:
    """Write `folder`, replacing one that exists. All ranks call it; rank 0 writes.

    After full fine-tuning, weights have the dtype of the base model; an adapter keeps the dtype it was trained in.
    """
    lora = job.method.kind == "lora"
    weights = strategy.gathered(lambda parameter: parameter.requires_grad or not lora)
    if strategy.rank:
        return
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if lora:
        strategy.model.save_pretrained(aside, state_dict=weights, save_embedding_layers=False)
        (aside / "README.md").unlink(missing_ok=True)  # peft's model card template
    else:
        dtype = AutoConfig.from_pretrained(
            str(job.model), local_files_only=True, trust_remote_code=False
        ).dtype
        buffers = {name: each.cpu() for name, each in strategy.model.named_buffers()}
        persistent = {name: buffers[name] for name in strategy.model.state_dict() if name in buffers}
        cast = {name: each.to(dtype) if each.is_floating_point() else each for name, each in weights.items()}
        strategy.model.save_pretrained(aside, state_dict=cast | persistent)
        described = json.loads((aside / "config.json").read_text())
        described["dtype"] = str(dtype).removeprefix("torch.")
        (aside / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    for pattern in TOKENIZER:  # unchanged: their digest identifies the tokenizer
        for path in job.model.glob(pattern):
            shutil.copyfile(path, aside / path.name)
    (aside / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    put(aside, folder)


def put(aside: Path, folder: Path) -> None:
    """Rename a complete folder, and write its manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    write_manifest(folder, folder.with_name(folder.name + ".sha256"))
