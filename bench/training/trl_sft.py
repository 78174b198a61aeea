"""TRL's SFTTrainer, as it is, on the rows of bench/sft.py: its second argument is a data set, the first the model.

Prints JSON: seconds from the start of the process to the first step; seconds, CPU seconds and loss of each step; peak memory.
"""

import argparse
import json
import resource
import time

BEGUN = time.time()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--accumulation", type=int, required=True)
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
parser.add_argument("--method", choices=["lora", "full"], default="lora")
parser.add_argument("--checkpointing", action="store_true")
options = parser.parse_args()
cuda, lora = options.device == "cuda", options.method == "lora"


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when steps begin and end."""

    def __init__(self) -> None:
        self.began: list[tuple[float, float]] = []
        self.ended: list[tuple[float, float]] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.began.append((time.time(), time.process_time()))

    def on_step_end(self, *_: object, **__: object) -> None:
        if cuda:
            torch.cuda.synchronize()  # work on a GPU is asynchronous
        self.ended.append((time.time(), time.process_time()))


# As llm-train does: a frozen base is in 16 bit, weights that learn are in 32 and computed with in 16.
dtype = torch.bfloat16 if cuda and lora else torch.float32
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa")
tokenizer = AutoTokenizer.from_pretrained(options.model)
ids = load_file(f"{options.data}/rows-00000.safetensors")["input_ids"]
clock = Clock()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=f"{options.data}/trl",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=3e-5,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=options.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=ids.shape[1],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
    processing_class=tokenizer,
    peft_config=LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    if lora
    else None,
    callbacks=[clock],
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
steps = list(zip(clock.began, clock.ended, strict=True))
seconds = [end[0] - begin[0] for begin, end in steps]
cpu = [end[1] - begin[1] for begin, end in steps]
peak = (
    torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
)
told = {"to_first_step": clock.began[0][0] - BEGUN, "seconds": seconds, "cpu": cpu, "losses": losses}
print(json.dumps({**told, "peak_gb": peak / 1e9}))
