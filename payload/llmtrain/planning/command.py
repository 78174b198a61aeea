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
    from llmtrain.planning.hardware import detect, hardware_of
    from llmtrain.planning.plan import NoFit, plan

    job = load(options.job, Job)
    nodes = options.nodes or job.scale.nodes
    if options.gpu:
        gpus = options.gpus or job.scale.processes or 1
        network = options.network or 12.5
        hardware = hardware_of(options.gpu, gpus, options.memory, nodes, options.host_memory, network)
    elif options.memory or options.host_memory or options.network:
        raise Refusal("--memory, --host-memory and --network need --gpu: add, for example, --gpu a100")
    else:
        hardware = detect(nodes, options.gpus or job.scale.processes)
    try:
        result = plan(job, hardware, options.seq_len)
    except NoFit as refusal:
        if options.json:
            print(json.dumps({"fits": False, "would_fit": refusal.would_fit, **as_json(refusal.nearest)}))
        raise
    print(json.dumps({"fits": True, **as_json(result)}) if options.json else text(result))
    return DONE


def as_json(plan: Any) -> dict[str, Any]:
    """A plan as JSON."""
    return {**asdict(plan), "total": plan.total}


def text(plan: Any) -> str:
    """A plan as text."""
    unit = "process" if plan.tokens_per_second is None else "GPU"
    lines = [
        f"{plan.strategy} on {plan.world_size} × {plan.memory:.1f} GiB, {plan.precision}, offload {plan.offload}",
        f"a step: {plan.world_size} × {plan.accumulation} × {plan.micro_batch} rows of {plan.seq_len} tokens",
        f"activation checkpointing: {'yes' if plan.checkpointing else 'no'}",
        f"GiB on each {unit}, of which {plan.room:.1f} is usable:",
    ]
    lines += [f"  {name:12} {size:7.2f}" for name, size in plan.parts.items() if size >= 0.005]
    lines.append(f"  {'total':12} {plan.total:7.2f}")
    if plan.tokens_per_second is not None:
        hours = f", {plan.hours:.1f} hours" if plan.hours is not None else ""
        lines.append(f"about {plan.tokens_per_second:,.0f} tokens/s{hours}")
    return "\n".join([*lines, "why:", *(f"  {reason}" for reason in plan.reasons)])
