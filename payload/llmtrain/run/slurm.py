"""`llm-train run --launcher slurm`: submits a job to Slurm, and runs on each node that Slurm starts it on."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llmtrain.exits import ALTERED, DONE, FAILED, NO_FIT, UNHEALTHY, USAGE, Refusal
from llmtrain.job import Job

PORT = 29400  # where the nodes of a job meet; role llm_training opens it among the hosts that train
ENDED = (DONE, USAGE, NO_FIT, ALTERED, UNHEALTHY)  # what another start does not change

# The submitter's environment stays where it is (--export=NIL). The first node, where this runs, is where the others meet it.
SCRIPT = """#!/bin/sh
export PATH=/usr/local/bin:/usr/bin:/bin HOME=/nonexistent PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
srun --export=ALL --kill-on-bad-exit=1 {run} --rendezvous "$SLURMD_NODENAME:{port}"{inline}
code=$?
case $code in {ended}) exit $code ;; esac
# Stopped with a save, or failed: queued again, it goes on from its last good checkpoint.
scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def add_options(run: argparse.ArgumentParser) -> None:
    slurm = run.add_argument_group("Slurm")
    slurm.add_argument(
        "--launcher",
        choices=["slurm"],
        help="submit the job to Slurm, which starts it on its nodes, and restarts it when one is lost",
    )
    slurm.add_argument(
        "--hosts", metavar="NODE,NODE", help="Slurm's nodes to run on; default: any that are free"
    )
    slurm.add_argument(
        "--gpus", type=int, default=0, help="number of GPUs to request from Slurm on each node"
    )
    slurm.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="SECONDS",
        help="seconds before the job's time limit at which Slurm makes it save and stop (300)",
    )


def starts_here(environment: Mapping[str, str]) -> bool:
    """Whether this process is one that Slurm started, rather than the one that submits."""
    return "SLURM_STEP_ID" in environment and "SLURM_NODEID" in environment


def script(options: argparse.Namespace, text: str = "") -> str:
    """The batch script, which starts `llm-train run` once on each node: with the job file, or with `text`, a line of JSON."""
    run = ["llm-train", "run", "/dev/stdin" if text else str(options.job.resolve()), "--launcher", "slurm"]
    for name in ("prepare", "key_file"):
        if path := getattr(options, name):
            run += [f"--{name.replace('_', '-')}", str(path.resolve())]
    if options.traffic:
        run += ["--traffic", options.traffic]
    run += ["--restarts", str(options.restarts)]
    inline = f" <<'JOB'\n{text}\nJOB" if text else ""  # srun gives it to each node
    return SCRIPT.format(run=shlex.join(run), port=PORT, inline=inline, ended="|".join(map(str, ENDED)))


def sbatch(options: argparse.Namespace, job: Job, nodes: int) -> list[str]:
    """The command that reads the script."""
    command = [
        "sbatch", "--parsable", f"--job-name={job.name}", f"--nodes={nodes}", "--ntasks-per-node=1", "--exclusive",
        "--requeue", f"--signal=TERM@{options.grace}", "--export=NIL", "--chdir=/", "--open-mode=append",
        f"--output={job.output}.slurm-%j.log",
    ]  # fmt: skip
    if options.gpus:
        command.append(f"--gres=gpu:{options.gpus}")
    if options.hosts:
        command.append(f"--nodelist={options.hosts}")
    return command


def submit(options: argparse.Namespace, job: Job, nodes: int) -> int:
    """Submit the job to Slurm and print its number; with --dry-run, print what would be submitted. Raises Refusal."""
    text, command = script(options), sbatch(options, job, nodes)
    if options.dry_run:
        print(f"{shlex.join(command)} <<'END'\n{text}END")
        return DONE
    number = hand_over(job, command, text)
    print(message(job, number), file=sys.stderr)
    print(number)
    return DONE


def hand_over(job: Job, command: list[str], text: str) -> str:
    """Submit a script to Slurm; returns the job's number. Raises Refusal."""
    try:
        process = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refusal(
            "there is no sbatch here: submit on a Slurm node (role slurm_node), or omit --launcher"
        ) from error
    if process.returncode:
        raise Refusal(f"Slurm did not accept {job.name}: {process.stderr.strip()}", FAILED)
    return process.stdout.strip().partition(";")[0]


def message(job: Job, number: str) -> str:
    log = Path(f"{job.output}.slurm-{number}.log")
    return f"llm-train: {job.name} is Slurm's job {number}; its log is {log} on its first node"


def take_place(options: argparse.Namespace) -> None:
    """Put this node's place in the job into the options."""
    options.nodes = int(os.environ["SLURM_NNODES"])
    options.node_rank = int(os.environ["SLURM_NODEID"])
