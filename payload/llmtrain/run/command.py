"""`llm-train run job.yaml`: start or resume this node's part of a job."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from llmcore.config import load
from llmtrain.data.command import prepare
from llmtrain.exits import DONE, Refusal
from llmtrain.job import Job
from llmtrain.run import slurm


def add_command(commands: Any) -> None:
    run = commands.add_parser("run", help="train, or resume a job that was stopped", description=__doc__)
    run.add_argument("job", type=Path, help="job.yaml; its keys are in docs/use/training.md")
    run.add_argument(
        "--prepare",
        type=Path,
        metavar="DATA.YAML",
        help="first prepare the data set, as `llm-train data run` does",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print the plan and the DeepSpeed configuration, and exit"
    )
    run.add_argument(
        "--json",
        action="store_true",
        help="print the plan as JSON, with LoRA's layers and the DeepSpeed configuration",
    )
    run.add_argument("--nodes", type=int, help="number of hosts; default: scale.nodes")
    run.add_argument("--node-rank", type=int, default=0, help="rank of this host, from 0")
    run.add_argument(
        "--rendezvous",
        default="",
        metavar="HOST:PORT",
        help="address of node 0; not needed for a single node",
    )
    run.add_argument(
        "--traffic",
        choices=["esp", "clear"],
        help="protection of the traffic between nodes; required for several nodes, and recorded in training.json",
    )
    run.add_argument("--restarts", type=int, default=3, help="how often failed processes are restarted (3)")
    run.add_argument(
        "--key-file", type=Path, help="checkpoint key; default: the systemd credential llm-train.key"
    )
    slurm.add_options(run)
    run.set_defaults(run=run_command)


def run_command(options: argparse.Namespace) -> int:
    """Verify the inputs, plan, and launch; raises Refusal."""
    job = load(options.job, Job)
    submits = options.launcher == "slurm" and not slurm.starts_here(os.environ)
    if options.launcher == "slurm" and not submits:
        slurm.take_place(options)
    nodes = options.nodes or job.scale.nodes
    if not 0 <= options.node_rank < nodes:
        raise Refusal(
            f"--node-rank is {options.node_rank}, but there are {nodes} node(s): specify 0 to {nodes - 1}"
        )
    if nodes > 1 and not options.rendezvous and not submits:
        raise Refusal(f"{nodes} nodes need --rendezvous HOST:PORT of node 0, the same on all of them")
    if nodes > 1 and not options.traffic:
        raise Refusal(
            f"{nodes} nodes exchange gradients and weights, which others on their network could read and change: protect them "
            f"(role ipsec) and use --traffic esp, or accept the risk with --traffic clear"
        )
    if submits:
        return slurm.submit(options, job, nodes)
    from llmtrain.run.setup import job_digest, set_up

    if (result_file := job.output / "training.json").is_file() and not options.dry_run:
        if json.loads(result_file.read_text())["job_digest"] != job_digest(job):
            raise Refusal(
                f"{result_file.parent} belongs to another job: set another output for this one, or move it away"
            )
        print(f"llm-train: {result_file} exists: this job is done", file=sys.stderr)
        return DONE
    if options.prepare and (code := prepare(options.prepare)):
        return code
    import torch

    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it, and it warns of a missing kernel
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed warns at length that it found no accelerator
    from llmtrain.planning.command import as_json, text
    from llmtrain.planning.hardware import detect
    from llmtrain.run.checkpoint import read_key
    from llmtrain.run.input_checks import verify
    from llmtrain.run.launch import Nodes, launch

    hardware = detect(nodes, job.scale.processes)
    plan, setup = set_up(job, hardware, verify(job), options.traffic if nodes > 1 else None)
    if options.json:
        print(
            json.dumps({"plan": as_json(plan), "lora_targets": setup.targets, "deepspeed": setup.deepspeed})
        )
    else:
        print(text(plan))
        if options.dry_run and setup.deepspeed:
            print(f"DeepSpeed configuration:\n{json.dumps(setup.deepspeed, indent=1)}")
    if options.dry_run:
        return DONE
    key = read_key(options.key_file)
    where = Nodes(nodes, options.node_rank, options.rendezvous, options.restarts)
    return launch(job.name, where, hardware.gpus, job, setup, key)
