"""`llm-train plan`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtrain.exits import DONE, Refusal


def add_command(commands: Any) -> None:
    """llm-train plan."""
    command = commands.add_parser(
        "plan", help="how a job would run, what it takes and how long; starts nothing"
    )
    command.add_argument("job", metavar="JOB.yaml", type=Path)
    command.add_argument("--gpu", help="a card, such as a100; without it, this machine is looked at")
    command.add_argument("--gpus", type=int, help="GPUs of a node; default: the job's scale.processes, or 1")
    command.add_argument("--memory", help="of a GPU, such as 80G; default: what the card is sold with")
    command.add_argument("--nodes", type=int, help="default: the job's scale.nodes")
    command.add_argument("--host-memory", help="of a node, such as 1T; default: twice its GPUs'")
    command.add_argument(
        "--network", type=float, help="GB/s between nodes; 12.5, which is 100 Gbit/s, is assumed"
    )
    command.add_argument("--seq-len", type=int, help="tokens of a row; default: as the job's data is packed")
    command.add_argument("--json", action="store_true", help="for programs")
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
        raise Refusal(
            "--memory, --host-memory and --network tell of a card that --gpu names: add --gpu a100, for example"
        )
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
    """A plan for programs."""
    return {**asdict(found), "total": found.total}


def text(found: Any) -> str:
    """A plan for people."""
    unit = "process" if found.tokens_per_second is None else "GPU"
    lines = [
        f"{found.strategy} on {found.world_size} × {found.memory:.1f} GiB, {found.precision}, offload {found.offload}",
        f"a step: {found.world_size} × {found.accumulation} × {found.micro_batch} rows of {found.seq_len} tokens",
        f"activation checkpointing: {'yes' if found.checkpointing else 'no'}",
        f"GiB on each {unit}, of which {found.room:.1f} may be used:",
    ]
    lines += [f"  {name:12} {size:7.2f}" for name, size in found.parts.items() if size >= 0.005]
    lines.append(f"  {'total':12} {found.total:7.2f}")
    if found.tokens_per_second is not None:
        hours = f", {found.hours:.1f} hours" if found.hours is not None else ""
        lines.append(f"about {found.tokens_per_second:,.0f} tokens/s{hours}")
    return "\n".join([*lines, "why:", *(f"  {reason}" for reason in found.reasons)])
