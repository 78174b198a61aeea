#!/usr/bin/python3.13
"""Compares llm-train with plain TRL, and measures the gain of packing: tokens per second, in turns.

The same training (by default the guide's LoRA in fp32, one process) on the same rows of the same model, each of one whole
document, so that both do the same work; then short documents with llm-train alone, packed and one per row. Padding tokens are not
counted. On a CPU, seconds are the processor's, as others share the machine; on a GPU (--device cuda, bf16) they are the clock's,
and the peak of allocated memory stands beside what the plan predicted. The loss of the first step is compared, too: the adapter
has no effect yet, and both must see the same model in the same way. Seconds from a process's start to its first step are printed,
which for llm-train include plan, checks and torchrun.

Without --model, the model is a Llama of 5 M parameters, made here. Needs `make env` and `make peers PEER=trl`; without the
latter, or where it fails, its figures are missing. Exit code 0, or 1 if the losses differ.
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

from stand import PYTHON, ROOT, skip

TRL = ROOT / "bench/.venv-trl/bin/python"
WARM = 3  # steps that do not count
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONPATH": f"{ROOT}/payload:{ROOT}/payload/tests/helpers",
}
# One thread: OpenBLAS' threads and OpenMP's wait for each other in a loop where cores are shared.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def ours(where: Path, data: str, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run of llm-train, its steps as metrics.jsonl has them."""
    name = f"{data}-{turn}"
    job = {
        "name": name,
        "model": str(where / "model"),
        "method": {"kind": options.method},
        "data": {"train": str(where / data)},
        "output": str(where / name),
        "optim": {"precision": precision(options), "steps": options.steps},
        "scale": {
            "strategy": "ddp", "processes": 1, "micro_batch": options.batch, "tokens_per_step": tokens_per_step(options),
            "checkpointing": options.checkpointing,
        },
        "watch": {"log_every": 1},
    }  # fmt: skip
    (where / f"{name}.yaml").write_text(json.dumps(job))
    command = [
        str(PYTHON),
        "-m",
        "llmtrain",
        "run",
        "--json",
        str(where / f"{name}.yaml"),
        "--key-file",
        str(where / "key"),
    ]
    begun = time.time()
    with (where / f"{name}.log").open("w+") as log:
        done = subprocess.run(
            command, check=False, env=environment(options), stdout=subprocess.PIPE, stderr=log, text=True
        )
        log.seek(0)
        if done.returncode:
            raise SystemExit(f"llm-train ended with {done.returncode}: {log.read()[-2000:]}")
    lines = [json.loads(line) for line in (where / name / "metrics.jsonl").read_text().splitlines()]
    stepped = [line for line in lines if "lr" in line]
    planned = json.loads(done.stdout.splitlines()[0])["plan"]
    return {
        "rates": [
            line["tokens"] / line["cpu_seconds"] if options.device == "cpu" else line["tokens_per_second"]
            for line in stepped
        ],
        "loss": stepped[0]["loss"],
        "to_first_step": datetime.fromisoformat(stepped[0]["time"]).timestamp() - begun,
        "mfu": stepped[-1]["mfu"] and statistics.median(line["mfu"] for line in stepped[WARM:]),
        "peak_gb": max(line["memory_gb"] for line in stepped),
        "planned_gb": planned["total"] * 2**30 / 1e9,
    }


def trls(where: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run of TRL; raises RuntimeError if it fails."""
    command: list[object] = [TRL, ROOT / "bench/training/trl_sft.py", where / "model", where / "whole"]
    command += ["--steps", options.steps, "--batch", options.batch, "--accumulation", options.accumulation]
    command += ["--device", options.device, "--method", options.method]
    command += ["--checkpointing"] if options.checkpointing else []
    with (where / "trl.log").open("w+") as log:
        done = subprocess.run(
            [str(each) for each in command],
            check=False,
            env=environment(options),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.seek(0)
        if done.returncode:
            raise RuntimeError(f"TRL ended with {done.returncode}: {log.read()[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    rates = [
        tokens_per_step(options) / seconds
        for seconds in told["cpu" if options.device == "cpu" else "seconds"]
    ]
    return {
        "rates": rates,
        "loss": told["losses"][0],
        "to_first_step": told["to_first_step"],
        "peak_gb": told["peak_gb"],
    }


def precision(options: argparse.Namespace) -> str:
    """Of the job."""
    return "fp32" if options.device == "cpu" else "bf16"


def tokens_per_step(options: argparse.Namespace) -> int:
    """Whole rows alone."""
    return int(options.seq_len * options.batch * options.accumulation)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of each run."""
    return ENVIRONMENT | (ONE_THREAD if options.device == "cpu" else {})


def median(runs: list[dict[str, Any]]) -> float:
    """Tokens a second, over all steps of all runs but the first of each."""
    return float(statistics.median(rate for run in runs for rate in run["rates"][WARM:]))


def measure(where: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All runs of each, in turns."""
    made_by = [PYTHON, ROOT / "bench/training/make_rows.py", where, "--seq-len", options.seq_len]
    if options.model:
        for suffix in "", ".sha256":
            (where / f"model{suffix}").symlink_to(f"{options.model.resolve()}{suffix}")
        made_by += ["--model", where / "model"]
    subprocess.run(
        [str(each) for each in made_by],
        check=True,
        env=environment(options),
        stdout=subprocess.DEVNULL,
    )
    names = ["llm-train", "trl", *([] if options.whole_only else ["packed", "unpacked"])]
    if not TRL.exists():
        skip("TRL: not there, `make peers PEER=trl` installs it")
        names.remove("trl")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.turns):
        for name in list(runs):
            try:
                if name == "trl":
                    runs[name].append(trls(where, options))
                else:
                    runs[name].append(ours(where, "whole" if name == "llm-train" else name, turn, options))
            except RuntimeError as error:  # ours has its figures nevertheless
                print(error, file=sys.stderr)
                del runs[name]
                continue
            print(f"turn {turn}, {name}: {median(runs[name][-1:]):.0f} tokens/s", file=sys.stderr, flush=True)
    return runs


def main() -> int:
    """Run in turns, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a Llama's directory, its manifest beside it (DIRECTORY.sha256)"
    )
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="rows at a time (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--whole-only", action="store_true", help="leave out what packing brings")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        runs = measure(Path(made), options)
    unit = "CPU-s" if options.device == "cpu" else "s"
    if options.json:
        print(
            json.dumps(
                {"unit": f"tokens/{unit}", "runs": runs, "medians": {n: median(r) for n, r in runs.items()}}
            )
        )
    else:
        for name, found in runs.items():
            start = statistics.median(run["to_first_step"] for run in found)
            peak = max(run["peak_gb"] for run in found)
            planned = f" (planned {found[0]['planned_gb']:.2f})" if "planned_gb" in found[0] else ""
            print(
                f"{name:10} {median(found):8.0f} tokens/{unit}, first step after {start:5.1f} s, its loss "
                f"{found[0]['loss']:.4f}, peak {peak:.2f} GB{planned}"
            )
        if "trl" in runs:
            print(
                f"llm-train / trl      {median(runs['llm-train']) / median(runs['trl']):.2f} (wanted: 0.95)"
            )
        if "packed" in runs:
            print(f"packed / unpacked    {median(runs['packed']) / median(runs['unpacked']):.2f} (wanted: 2)")
    same = "trl" not in runs or abs(runs["llm-train"][0]["loss"] - runs["trl"][0]["loss"]) < 0.05
    if not same:
        print("the losses of the first step differ: the two did not do the same work", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
