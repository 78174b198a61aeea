"""`llmkeep sbom bundle`: software bills of materials (CycloneDX 1.6).

Exit codes: 0 written; 1 refused or failed; 2 wrong usage; 4 there is no bundle, or half of one.
"""

import argparse
import sys
from pathlib import Path

from llmkeep.bundle import bill
from llmkeep.durable import write


def _bundle(given: argparse.Namespace) -> int:
    content = bill.encoded(bill.of_bundle(given.folder))
    if given.out:
        write(given.out, content, 0o644)
    else:
        sys.stdout.write(content.decode())
    return 0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep sbom …`."""
    parser = subparsers.add_parser("sbom", help="software bills of materials", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "bundle", help="of a bundle, from its manifest; the same bundle gives the same bytes"
    )
    verb.add_argument("folder", type=Path, help="bundle; `llmkeep bundle verify` checks it")
    verb.add_argument("--out", type=Path, help="file to write (default: standard output)")
    verb.set_defaults(run=_bundle)
