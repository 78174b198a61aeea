"""The loss of TRL's own DPOTrainer or KTOTrainer on one batch, as JSON; in the environment of `make peers PEER=trl`."""

import json
import sys
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

given: dict[str, Any] = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"])
tokenizer.pad_token = tokenizer.eos_token


def plain(example: dict[str, Any]) -> dict[str, Any]:
    """Prompt and answers as text, each answer up to the token that ends its turn; TRL would learn the line feed, too."""
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, tokenize=False)
    answers = {
        name: tokenizer.apply_chat_template([*example["prompt"], *said], tokenize=False)
        .removeprefix(prompt)
        .removesuffix("\n")
        for name, said in example.items()
        if name in ("chosen", "rejected", "completion")
    }
    return {**example, "prompt": prompt, **answers}


data = Dataset.from_list([plain(each) for each in given["examples"]])
before, after = (AutoModelForCausalLM.from_pretrained(given[name]) for name in ("before", "after"))
arguments = {
    "output_dir": "trl", "per_device_train_batch_size": len(data), "beta": given["beta"], "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "max_length": None, "gradient_checkpointing": False, "bf16": False,
}  # fmt: skip
if given["kind"] == "dpo":
    trainer: Any = DPOTrainer(
        after, before, DPOConfig(**arguments), train_dataset=data, processing_class=tokenizer
    )
else:
    weights = {name: given[name] for name in ("desirable_weight", "undesirable_weight")}
    config = KTOConfig(**arguments, **weights, train_sampling_strategy="sequential")
    trainer = KTOTrainer(after, before, config, train_dataset=data, processing_class=tokenizer)
[batch] = trainer.get_train_dataloader()
print(json.dumps(float(trainer.compute_loss(trainer.model, batch))))
