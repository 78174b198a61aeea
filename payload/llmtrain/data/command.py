"""`llm-train data run | where`."""

import argparse
import json
import os
import sys
from pathlib import Path

from llmtrain import exits


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data` to llm-train's commands."""
    data = commands.add_parser("data", help="from raw text to rows for training")
    actions = data.add_subparsers(dest="action", required=True)
    run = actions.add_parser(
        "run",
        help="read, clean, filter, deduplicate, tokenize, pack",
        description="Make the data set that the configuration describes. What is there already is not made again.",
    )
    run.add_argument("--config", type=Path, required=True, metavar="DATA.YAML")
    run.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes; default: as many as there are CPUs. Changes no byte of the result",
    )
    run.add_argument(
        "--prune", action="store_true", help="then take away what this run did not use of the work"
    )
    run.set_defaults(run=run_command)


def run_command(arguments: argparse.Namespace) -> int:
    """Make the data set; the report on stdout."""
    from llmcore.config import load
    from llmtrain.data.run import run
    from llmtrain.data.settings import Settings

    if arguments.workers < 0:
        raise exits.Refusal(f"--workers is {arguments.workers}: want 1 or more")
    settings = load(arguments.config, Settings)
    workers = arguments.workers or len(os.sched_getaffinity(0))
    try:
        report = run(settings, workers, arguments.prune)
    except KeyboardInterrupt:
        print("llm-train: stopped; run it again to go on", file=sys.stderr)
        return exits.STOPPED
    print(json.dumps(report["rows"], indent=1))
    return exits.DONE
