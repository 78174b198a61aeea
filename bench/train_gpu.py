#!/usr/bin/python3.13
"""llm-train on GPUs: tokens a second a GPU and model FLOPs utilisation, beside what others publish. NEVER RUN: there was no GPU.

The model is a real one on this host's disk, with the manifest that it was installed with; rows are random tokens, each one
document of full length. The job has all GPUs of this host, or of several: start it on each with --nodes, --node-rank and
--rendezvous; the node of rank 0 prints. MFU counts 6 FLOPs a parameter and token for full training and 4 for LoRA, against
the data sheet's dense bf16.

    bench/train_gpu.py --model /srv/models/deepseek-llm-7b --manifest /srv/models/deepseek-llm-7b.sha256 --method full
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from stand import PYTHON, ROOT

WARM = 5  # steps that do not count
# Tokens a second a GPU and MFU, as published by others; none of it was measured here.
ANCHORS = """\
published by others           GPUs          tokens/s/GPU   MFU      where
MPT-7B full, 2048             8 x A100-80          4,641   64.2 %   llm-foundry, benchmarking
MPT-7B full, 4096             8 x A100-80          3,684   54.8 %   llm-foundry, benchmarking
MPT-7B full, 2048             8 x H100            10,643   46.4 %   llm-foundry, benchmarking
Llama-3.1-8B full, FSDP2      8 x H100             5,762   33 %     torchtitan, 2024-12
Llama-2-7B LoRA, 1024         1 x A100             2,954            LLaMA-Factory, with FlashAttention 2
Llama-3.1-8B LoRA, 2048       1 x A6000            4,699            torchtune, README
wanted of llm-train: 7B on 8 x A100-80 at 4096: 3,700 full (55 % MFU), 4,000 LoRA"""


def main() -> int:
    """Make rows, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--method", choices=["full", "lora"], default="lora")
    parser.add_argument("--strategy", choices=["auto", "ddp", "fsdp", "zero2", "zero3"], default="auto")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--tokens-per-step", type=int, default=524288)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--nodes", default="1")
    parser.add_argument("--node-rank", default="0")
    parser.add_argument("--rendezvous", default="")
    parser.add_argument("--traffic", choices=["esp", "clear"], default="clear")
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/payload:{ROOT}/payload/tests/helpers"}
    with tempfile.TemporaryDirectory() as made:
        where = Path(made)
        rows = max(64, options.tokens_per_step // options.seq_len)
        made_by = [PYTHON, ROOT / "bench/training/make_rows.py", where, "--model", options.model]
        made_by += ["--seq-len", options.seq_len, "--rows", rows]
        subprocess.run([str(each) for each in made_by], check=True, env=environment)
        job = {
            "name": "gpu",
            "model": str(options.model),
            "manifest": str(options.manifest),
            "method": {"kind": options.method},
            "data": {"train": str(where / "whole")},
            "output": str(where / "out"),
            "optim": {"steps": options.steps},
            "scale": {"strategy": options.strategy, "tokens_per_step": options.tokens_per_step},
            "watch": {"log_every": 1},
        }
        (where / "job.yaml").write_text(json.dumps(job))
        command = [PYTHON, "-m", "llmtrain", "run", where / "job.yaml", "--key-file", where / "key"]
        command += [
            "--nodes",
            options.nodes,
            "--node-rank",
            options.node_rank,
            "--rendezvous",
            options.rendezvous,
            "--traffic",
            options.traffic,
        ]
        code = subprocess.run([str(each) for each in command], check=False, env=environment).returncode
        metrics = where / "out" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [line for line in lines if "lr" in line][WARM:]
    if not code and not lines:
        print("done; the node of rank 0 has the numbers")
        return 0
    if code or not steps:
        print(f"llm-train ended with {code} after {len(steps)} steps that count", file=sys.stderr)
        return 1
    rate = statistics.median(line["tokens_per_second_gpu"] for line in steps)
    known = [line["mfu"] for line in steps if line["mfu"] is not None]
    mfu = f"{statistics.median(known):.1%}" if known else "unknown: the card is not in hardware.py"
    print(
        f"measured now: {rate:,.0f} tokens/s/GPU, MFU {mfu}, {max(line['memory_gb'] for line in steps):.1f} GB at the peak"
    )
    print(ANCHORS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
