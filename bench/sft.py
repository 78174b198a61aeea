#!/usr/bin/python3.13
"""llm-train beside plain TRL, and what packing brings: tokens a second on a CPU, in turns.

The same LoRA (the guide's recipe, fp32, one process) on the same rows of the same model, each of one whole document, so that
both do the same work; then short documents by llm-train alone, packed and one a row. Tokens are those that are no padding, and
seconds are CPU's, as others share the machine. The loss of the first step is compared, too: an adapter changes nothing yet, and
both must see the same model in the same way. Seconds from a process's start to its first step are printed, which for llm-train
has plan, checks and torchrun in it.

Without --model, the model is a Llama of 5 M parameters, made here. Needs `make env` and `make peers PEER=trl`.
Exit code 0, or 1 if the losses differ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from stand import PYTHON, ROOT

TRL = ROOT / "bench/.venv-trl/bin/python"
SEQ_LEN, BATCH, ACCUMULATION = 256, 4, 2
WARM = 3  # steps that do not count
# One thread: OpenBLAS' threads and OpenMP's wait for each other in a loop where cores are shared.
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONPATH": f"{ROOT}/payload:{ROOT}/payload/tests/helpers",
}


def ours(where: Path, data: str, steps: int, turn: int) -> dict[str, Any]:
    """A run of llm-train, its steps as metrics.jsonl has them."""
    name = f"{data}-{turn}"
    job = {
        "name": name,
        "model": str(where / "model"),
        "method": {"kind": "lora"},
        "data": {"train": str(where / data)},
        "output": str(where / name),
        "optim": {"precision": "fp32", "steps": steps},
        "scale": {
            "strategy": "ddp", "processes": 1, "micro_batch": BATCH, "tokens_per_step": SEQ_LEN * BATCH * ACCUMULATION,
            "checkpointing": False,
        },
        "watch": {"log_every": 1},
    }  # fmt: skip
    (where / f"{name}.yaml").write_text(json.dumps(job))
    command = [
        str(PYTHON),
        "-m",
        "llmtrain",
        "run",
        str(where / f"{name}.yaml"),
        "--key-file",
        str(where / "key"),
    ]
    begun = time.time()
    with (where / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, env=ENVIRONMENT, stdout=log, stderr=log)
    lines = [json.loads(line) for line in (where / name / "metrics.jsonl").read_text().splitlines()]
    stepped = [line for line in lines if "lr" in line]
    return {
        "rates": [line["tokens"] / line["cpu_seconds"] for line in stepped],
        "loss": stepped[0]["loss"],
        "to_first_step": datetime.fromisoformat(stepped[0]["time"]).timestamp() - begun,
    }


def trls(where: Path, steps: int) -> dict[str, Any]:
    """A run of TRL."""
    command = [
        TRL,
        ROOT / "bench/training/trl_sft.py",
        where / "model",
        where / "whole",
        steps,
        BATCH,
        ACCUMULATION,
    ]
    done = subprocess.run(
        [str(each) for each in command],
        check=True,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    tokens = SEQ_LEN * BATCH * ACCUMULATION
    rates = [tokens / seconds for seconds in told["cpu"]]
    return {"rates": rates, "loss": told["losses"][0], "to_first_step": told["to_first_step"]}


def median(runs: list[dict[str, Any]]) -> float:
    """Tokens a second of CPU, over all steps of all runs but the first of each."""
    return float(statistics.median(rate for run in runs for rate in run["rates"][WARM:]))


def main() -> int:
    """Run in turns, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a Llama's directory, its manifest beside it (DIRECTORY.sha256)"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        where = Path(made)
        made_by = [PYTHON, ROOT / "bench/training/make_rows.py", where, "--seq-len", SEQ_LEN]
        if options.model:
            for suffix in "", ".sha256":
                (where / f"model{suffix}").symlink_to(f"{options.model.resolve()}{suffix}")
            made_by += ["--model", where / "model"]
        subprocess.run(
            [str(each) for each in made_by], check=True, env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        runs: dict[str, list[dict[str, Any]]] = {"llm-train": [], "trl": [], "packed": [], "unpacked": []}
        for turn in range(options.turns):
            for name, found in runs.items():
                data = "whole" if name == "llm-train" else name
                found.append(
                    trls(where, options.steps) if name == "trl" else ours(where, data, options.steps, turn)
                )
                print(
                    f"turn {turn}, {name}: {median(found[-1:]):.0f} tokens/CPU-s", file=sys.stderr, flush=True
                )
        for name, found in runs.items():
            start = statistics.median(run["to_first_step"] for run in found)
            print(
                f"{name:10} {median(found):8.0f} tokens/CPU-s, first step after {start:5.1f} s, its loss {found[0]['loss']:.4f}"
            )
        print(f"llm-train / trl      {median(runs['llm-train']) / median(runs['trl']):.2f} (wanted: 0.95)")
        print(f"packed / unpacked    {median(runs['packed']) / median(runs['unpacked']):.2f} (wanted: 2)")
        same = abs(runs["llm-train"][0]["loss"] - runs["trl"][0]["loss"]) < 0.05
        if not same:
            print("the losses of the first step differ: the two did not do the same work", file=sys.stderr)
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
