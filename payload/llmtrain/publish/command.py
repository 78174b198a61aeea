"""`llm-train publish JOB_OUTPUT --into DIR`: make a servable model, a release candidate, of a job's output.

DIR gets models/NAME, a complete model with its card, and models/NAME.sha256, its manifest. On the control node,
`llmkeep release sign DIR` makes a release of it. An adapter is merged into the base's weights, and the result is only kept if
its logits are those of the unmerged adapter: rounding to few bits can cancel a small adapter, and some architectures do not
compute with the weights that the adapter changes.
"""

import argparse
from pathlib import Path
from typing import Any

from llmcore.privileges import become_owner
from llmtrain.exits import DONE
from llmtrain.publish.release_candidate import publish


def run(options: argparse.Namespace) -> int:
    become_owner(options.output, *filter(None, [options.verdict]))
    name = options.name or options.output.resolve().name
    verdict = options.verdict or options.output / "verdict.json"
    more = options.unproved, options.dtype, options.licence
    print(
        f"{publish(options.output, options.into, name, verdict, *more)}: sign it on the control node with llmkeep release sign"
    )
    return DONE


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "publish",
        help="make a complete model of a job's output: a release candidate",
        description=__doc__,
    )
    parser.add_argument("output", type=Path, metavar="JOB_OUTPUT", help="`output` of the job")
    parser.add_argument("--into", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--name", help="name of the model; default: that of JOB_OUTPUT")
    parser.add_argument(
        "--verdict", type=Path, help="verdict of llm-train compare; default: JOB_OUTPUT/verdict.json"
    )
    parser.add_argument(
        "--unproved", metavar="REASON", help="publish without a promotion; the card shows the reason"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="dtype of merged weights; auto: that of the base",
    )
    parser.add_argument("--licence", help="licence of the base, if its directory does not state it")
    parser.set_defaults(run=run)
