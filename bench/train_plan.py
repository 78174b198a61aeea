#!/usr/bin/python3.13
"""How wrong the plan's memory is: what `llm-train plan` says of a training step on this CPU, beside what the step took.

    bench/train_plan.py [MODEL_DIR]        default: SmolLM2-135M, which `make bundle` leaves in .lab/bundle/models

LoRA and full fine-tuning, with and without activation checkpointing, each in a process of its own that trains two steps
of random tokens in 32 bit (payload/tests/helpers/measured_step.py, which a test runs, too). Needs `make env` and 6 GiB of memory.
Exit code 0, or 1 where a peak is more than 15 % above its plan: the error that would end a job.
"""

import json
import subprocess
import sys
from pathlib import Path

from stand import PYTHON, ROOT

SMOLLM2 = ROOT / ".lab/bundle/models/smollm2-135m-instruct"
PROGRAM = ROOT / "payload/tests/helpers/measured_step.py"
SEQ_LEN, MICRO_BATCH = 512, 1
MIB = 2**20


def main() -> int:
    """A line for each way to train."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else SMOLLM2
    print(f"{model.name}, a micro-batch of {MICRO_BATCH} × {SEQ_LEN} tokens, fp32; MiB planned / measured")
    print(
        f"{'':24}"
        + "".join(f"{name:>18}" for name in ("weights", "gradients", "optimizer", "activations", "peak"))
    )
    worst = 0.0
    for method in ("full", "lora"):
        for checkpointing in ("no", "yes"):
            command = [
                PYTHON,
                str(PROGRAM),
                str(model),
                method,
                str(SEQ_LEN),
                str(MICRO_BATCH),
                checkpointing,
            ]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            told = json.loads(done.stdout.splitlines()[-1])
            said, was = told["planned"], told["measured"]
            if checkpointing == "yes":
                del was[
                    "activations"
                ]  # between steps; the plan's are those of a layer that is computed again, too
            columns = [
                f"{said[name] / MIB:.0f} / {was[name] / MIB:.0f}" if name in was else "-"
                for name in ("weights", "gradients", "optimizer", "activations", "peak")
            ]
            error = said["peak"] / was["peak"] - 1
            worst = min(worst, error)
            title = f"{method}, checkpointing {checkpointing}"
            print(
                f"{title:24}" + "".join(f"{column:>18}" for column in columns) + f"   peak {error:+.1%}",
                flush=True,
            )
    return 0 if worst > -0.15 else 1


if __name__ == "__main__":
    sys.exit(main())
