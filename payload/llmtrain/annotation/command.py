"""`llm-train annotate export | import`."""

import argparse
from pathlib import Path

from llmtrain.annotation.judgements import import_
from llmtrain.annotation.tasks import ANSWERS, export
from llmtrain.feedback.export import KINDS


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def least(text: str) -> float | None:
    """A number from 0 to 1, or none."""
    return None if text == "none" else share(text)


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `llm-train annotate`."""
    annotate = commands.add_parser("annotate", help="have examples judged by annotators in Label Studio")
    actions = annotate.add_subparsers(dest="action", required=True)
    command = actions.add_parser("export", help="write tasks for Label Studio to a new folder")
    command.add_argument(
        "--examples",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder written by `llm-train feedback export`, or JSON lines",
    )
    command.add_argument("--kind", choices=sorted(ANSWERS), required=True, help="what annotators are asked")
    command.add_argument(
        "--labels", type=Path, metavar="FILE", help="for kind labels: question and labels, YAML"
    )
    command.add_argument(
        "--overlap",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="share of tasks for a second annotator (default: 0.2)",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.set_defaults(run=export)
    taking = actions.add_parser("import", help="write examples from annotations to a new folder")
    taking.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="folder written by `export`")
    taking.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="Label Studio's JSON exports",
    )
    taking.add_argument("--kind", choices=sorted(KINDS), required=True, help="kind of the examples")
    taking.add_argument(
        "--least-alpha",
        type=least,
        default=0.667,
        metavar="ALPHA",
        help="Krippendorff's alpha below which nothing is written, or none (default: 0.667)",
    )
    taking.add_argument(
        "--held-out", type=Path, metavar="FILE", help="JSON lines of which no example may contain a part"
    )
    taking.add_argument("--out", type=Path, required=True, metavar="DIR")
    taking.set_defaults(run=import_)
