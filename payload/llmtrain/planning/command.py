"""`llm-train plan`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtrain.exits import DONE, Refusal


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "plan", help="predict how a job runs, its memory and its duration; starts nothing"
    )
    command.add_argument("job", metavar="JOB.yaml", type=Path)
    command.add_argument("--gpu", help="GPU model, such as a100; default: the GPUs of this machine")
    command.add_argument("--gpus", type=int, help="GPUs per node; default: the job's scale.processes, or 1")
    command.add_argument(
        "--memory", help="memory of a GPU, such as 80G; default: that of the model's data sheet"
    )
    command.add_argument("--nodes", type=int, help="number of nodes; default: the job's scale.nodes")
    command.add_argument(
        "--host-memory", help="memory of a node, such as 1T; default: twice that of its GPUs"
    )
    command.add_argument(
        "--network", type=float, help="GB/s between nodes; default: 12.5, which is 100 Gbit/s"
    )
    command.add_argument("--seq-len", type=int, help="tokens per row; default: that of the job's data")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=plan_command)


def plan_command(options: argparse.Namespace) -> int:
    """Print the plan; raises NoFit."""
    from llmcore.config import load
    from llmtrain.job import Job
    from llmtrain.planning.hardware import detect, given
    from llmtrain.planning.plan import NoFit, plan

    job = load(options.job, Job)
    nodes = options.nodes or job.scale.nodes
    if options.gpu:
        gpus = options.gpus or job.scale.processes or 1
        network = options.network or 12.5
        hardware = given(options.gpu, gpus, options.memory, nodes, options.host_memory, network)
    elif options.memory or options.host_memory or options.network:
        raise Refusal("--memory, --host-memory and --network need --gpu: add, for example, --gpu a100")
    else:
        hardware = detect(nodes, options.gpus or job.scale.processes)
    try:
        found = plan(job, hardware, options.seq_len)
    except NoFit as refusal:
        if options.json:
            print(json.dumps({"fits": False, "would_fit": refusal.would_fit, **as_json(refusal.nearest)}))
        raise
    print(json.dumps({"fits": True, **as_json(found)}) if options.json else text(found))
    return DONE


def as_json(found: Any) -> dict[str, Any]:
    """A plan as JSON."""
    return {**asdict(found), "total": found.total}


def text(found: Any) -> str:
    """A plan as text."""
    unit = "process" if found.tokens_per_second is None else "GPU"
    lines = [
        f"{found.strategy} on {found.world_size} × {found.memory:.1f} GiB, {found.precision}, offload {found.offload}",
        f"a step: {found.world_size} × {found.accumulation} × {found.micro_batch} rows of {found.seq_len} tokens",
        f"activation checkpointing: {'yes' if found.checkpointing else 'no'}",
        f"GiB on each {unit}, of which {found.room:.1f} is usable:",
    ]
    lines += [f"  {name:12} {size:7.2f}" for name, size in found.parts.items() if size >= 0.005]
    lines.append(f"  {'total':12} {found.total:7.2f}")
    if found.tokens_per_second is not None:
        hours = f", {found.hours:.1f} hours" if found.hours is not None else ""
        lines.append(f"about {found.tokens_per_second:,.0f} tokens/s{hours}")
    return "\n".join([*lines, "why:", *(f"  {reason}" for reason in found.reasons)])
