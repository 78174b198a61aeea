"""`llmkeep inventory check`."""

import argparse
from pathlib import Path

from llmkeep.inventory import check


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep inventory check`."""
    parser = subparsers.add_parser(
        "inventory", help="check an inventory, draw it; offline", description=__doc__
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("check", help="print its faults; contacts no host", description=check.__doc__)
    verb.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    verb.add_argument("--json", action="store_true", help="print JSON and nothing else")
    verb.add_argument("--graph", type=Path, metavar="FILE.svg", help="draw hosts, and ports between them")
    verb.set_defaults(run=check.check)
