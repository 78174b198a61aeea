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
    """Add `llm-train data`."""
    data = commands.add_parser("data", help="prepare training data from raw text")
    actions = data.add_subparsers(dest="action", required=True)
    run = actions.add_parser(
        "run",
        help="read, clean, filter, deduplicate, tokenize, pack",
        description="Build the data set that the configuration describes, reusing results that exist.",
    )
    run.add_argument("--config", type=Path, required=True, metavar="DATA.YAML")
    run.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="number of processes; default: the number of CPUs. Does not change the result",
    )
    run.add_argument(
        "--prune",
        action="store_true",
        help="afterwards delete results in the working directory that this run did not use",
    )
    run.set_defaults(run=run_command)

    where = actions.add_parser(
        "where",
        help="find the data files and models that contain a document",
        description="Exit code 0 if the document is found, 1 if not.",
    )
    where.add_argument(
        "asked",
        metavar="TEXT_OR_ID",
        help="an id, a text, or with --config any part of a text; - reads stdin",
    )
    where.add_argument(
        "--config", type=Path, metavar="DATA.YAML", help="search its output and its working directory"
    )
    where.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="data sets to search")
    where.add_argument(
        "--models", type=Path, metavar="DIR", help="search for trained models below this directory"
    )
    where.add_argument("--json", action="store_true")
    where.set_defaults(run=where_command)


def where_command(arguments: argparse.Namespace) -> int:
    """Print where a document occurs."""
    from llmcore.config import load
    from llmtrain.data.settings import Settings
    from llmtrain.data.where import where

    settings = load(arguments.config, Settings) if arguments.config else None
    data = [*([settings.output] if settings else []), *arguments.data]
    if not data:
        raise exits.Refusal("nothing to search: specify --config or --data")
    document = sys.stdin.read().strip() if arguments.asked == "-" else arguments.asked
    answer = where(document, data, settings, arguments.models)
    if arguments.json:
        print(json.dumps(answer, indent=1, ensure_ascii=False))
    else:
        for line in answer["rows"]:
            numbers = ", ".join(map(str, line["rows"]))
            print(f"{line['data']}/{line['file']}: rows {numbers}: {line['id']} from {line['source']}")
        for line in answer["dropped"]:
            print(f"{line['data']}: dropped: {line['id']} from {line['source']}: {line['reason']}")
        for line in answer["models"]:
            print(f"{line['model']}: trained on it")
        if not answer["rows"]:
            print("no row contains it")
    return exits.DONE if any(answer.values()) else exits.FAILED


def run_command(arguments: argparse.Namespace) -> int:
    return prepare(arguments.config, arguments.workers, arguments.prune)


def prepare(config: Path, workers: int = 0, prune: bool = False) -> int:
    """Build the data set, print its report, and return the exit code. With 0 workers, one per CPU runs."""
    from llmcore.config import load
    from llmtrain.data.pipeline import run
    from llmtrain.data.settings import Settings

    if workers < 0:
        raise exits.Refusal(f"--workers is {workers}: specify 1 or more")
    settings = load(config, Settings)
    # Stop as on Ctrl-C: finished results are kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(settings, workers or len(os.sched_getaffinity(0)), prune)
    except KeyboardInterrupt:
        print("llm-train: stopped; run it again to continue", file=sys.stderr)
        return exits.STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise exits.Refusal(
            f"{settings.work} or {settings.output} is full ({error.strerror}): free some space or move it, and run again; "
            f"finished results are kept",
            exits.NO_SPACE,
        ) from error
    print(json.dumps(report["rows"], indent=1))
    return exits.DONE
