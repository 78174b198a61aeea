"""TRL's SFTTrainer, as it is, on the rows of bench/sft.py: its second argument is a data set, the first the model.

Prints JSON: seconds from the start of the process to the first step, and seconds, CPU seconds and loss of each step.
"""

import json
import sys
import time

BEGUN = time.time()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

STEPS, BATCH, ACCUMULATION = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when steps begin and end."""

    def __init__(self) -> None:
        self.began: list[tuple[float, float]] = []
        self.ended: list[tuple[float, float]] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.began.append((time.time(), time.process_time()))

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ended.append((time.time(), time.process_time()))


model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = load_file(f"{sys.argv[2]}/rows-00000.safetensors")["input_ids"]
clock = Clock()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=f"{sys.argv[2]}/trl",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=3e-5,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
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
    ),
    callbacks=[clock],
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
steps = list(zip(clock.began, clock.ended, strict=True))
seconds = [end[0] - begin[0] for begin, end in steps]
cpu = [end[1] - begin[1] for begin, end in steps]
print(
    json.dumps({"to_first_step": clock.began[0][0] - BEGUN, "seconds": seconds, "cpu": cpu, "losses": losses})
)
