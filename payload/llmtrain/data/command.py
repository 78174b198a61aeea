"""`llm-train data run | where`."""

import argparse
import errno
import json
import os
import signal
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

    where = actions.add_parser(
        "where",
        help="which files of rows, and which models, hold a document",
        description="Exit code 0 where something holds it, 1 where nothing does.",
    )
    where.add_argument(
        "asked", metavar="TEXT_OR_ID", help="an id, a text, or with --config any part of one; - reads stdin"
    )
    where.add_argument("--config", type=Path, metavar="DATA.YAML", help="looks into its output and its work")
    where.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="DIR", help="data sets to look into"
    )
    where.add_argument("--models", type=Path, metavar="DIR", help="looks for trained models below it")
    where.add_argument("--json", action="store_true")
    where.set_defaults(run=where_command)


def where_command(arguments: argparse.Namespace) -> int:
    """Say what holds a document."""
    from llmcore.config import load
    from llmtrain.data.settings import Settings
    from llmtrain.data.where import where

    settings = load(arguments.config, Settings) if arguments.config else None
    data = [*([settings.output] if settings else []), *arguments.data]
    if not data:
        raise exits.Refusal("nothing to look into: give --config or --data")
    asked = sys.stdin.read().strip() if arguments.asked == "-" else arguments.asked
    answer = where(asked, data, settings, arguments.models)
    if arguments.json:
        print(json.dumps(answer, indent=1, ensure_ascii=False))
    else:
        for line in answer["rows"]:
            numbers = ", ".join(map(str, line["rows"]))
            print(f"{line['data']}/{line['file']}: rows {numbers}: {line['id']} from {line['source']}")
        for line in answer["dropped"]:
            print(f"{line['data']}: not in it: {line['id']} from {line['source']}: {line['reason']}")
        for line in answer["models"]:
            print(f"{line['model']}: trained on it")
        if not answer["rows"]:
            print("no row holds it")
    return exits.DONE if any(answer.values()) else exits.FAILED


def run_command(arguments: argparse.Namespace) -> int:
    """llm-train data run."""
    return prepare(arguments.config, arguments.workers, arguments.prune)


def prepare(config: Path, workers: int = 0, prune: bool = False) -> int:
    """Make the data set, its report on stdout; the exit code. 0 workers are as many as there are CPUs."""
    from llmcore.config import load
    from llmtrain.data.pipeline import run
    from llmtrain.data.settings import Settings

    if workers < 0:
        raise exits.Refusal(f"--workers is {workers}: want 1 or more")
    settings = load(config, Settings)
    # Ends as Ctrl-C does: what is done is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(settings, workers or len(os.sched_getaffinity(0)), prune)
    except KeyboardInterrupt:
        print("llm-train: stopped; run it again to go on", file=sys.stderr)
        return exits.STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise exits.Refusal(
            f"{settings.work} or {settings.output} is full ({error.strerror}): free space or move it, and run again; "
            "what is done is kept",
            exits.NO_SPACE,
        ) from error
    print(json.dumps(report["rows"], indent=1))
    return exits.DONE
