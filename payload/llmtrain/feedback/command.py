"""`llm-train feedback export | pack | remove`."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from llmcore.privileges import become_owner
from llmtrain.feedback.export import KINDS, export
from llmtrain.feedback.remove import remove


def when(text: str) -> str:
    """A date, or a date and time (UTC unless it names a zone), as sortable text."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a date: write, for example, 2026-11-27 or 2026-11-27T08:00"
        ) from None
    return (time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)).isoformat()


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def pack_command(arguments: argparse.Namespace) -> int:
    from llmtrain.feedback.pack import pack

    become_owner(arguments.examples, arguments.out)
    return pack(arguments.examples, arguments.model, arguments.seq_len, arguments.out)


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `llm-train feedback`."""
    feedback = commands.add_parser("feedback", help="make training examples from user feedback")
    actions = feedback.add_subparsers(dest="action", required=True)
    command = actions.add_parser("export", help="write examples for KTO, DPO or SFT to a new folder")
    command.add_argument(
        "--journal",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="the journal of each serving host",
    )
    command.add_argument("--since", type=when, required=True, metavar="DATE")
    command.add_argument("--until", type=when, metavar="DATE", help="default: now")
    command.add_argument("--kind", choices=sorted(KINDS), required=True)
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--per-subject",
        type=positive,
        default=100,
        metavar="N",
        help="maximum number of examples from one subject (default: 100)",
    )
    command.add_argument(
        "--held-out", type=Path, metavar="FILE", help="JSON lines of which no example may contain a part"
    )
    command.set_defaults(run=export)
    packing = actions.add_parser(
        "pack", help="tokenize examples for KTO or DPO into rows that `llm-train run` reads"
    )
    packing.add_argument(
        "--examples", type=Path, required=True, metavar="DIR", help="folder written by `export`"
    )
    packing.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="model whose tokenizer and chat template are used",
    )
    packing.add_argument(
        "--seq-len", type=positive, default=2048, metavar="TOKENS", help="tokens of a row (default: 2048)"
    )
    packing.add_argument("--out", type=Path, required=True, metavar="DIR")
    packing.set_defaults(run=pack_command)
    removing = actions.add_parser("remove", help="remove forgotten exchanges from exports")
    removing.add_argument(
        "--ids",
        type=Path,
        required=True,
        metavar="FILE",
        help="file written by `llm-serve feedback forget --ids`",
    )
    removing.add_argument("exports", type=Path, nargs="+", metavar="DIR", help="folder written by `export`")
    removing.set_defaults(run=remove)
