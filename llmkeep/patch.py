"""`llmkeep patch`: install newer Debian packages on the hosts, one host after the other, with a rollback if one fails.

The bundle with the packages must have been carried, bootstrapped and applied with `llmkeep site` (docs/operate/patch.md).

Exit codes: 0 done, or planned; 1 a host was not patched, with the reason; 130 interrupted, run it again.

"""

import argparse
import json
from pathlib import Path

from llmkeep import source_tree
from llmkeep.errors import printable
from llmkeep.playbooks import inventory_path, play
from llmkeep.record import software
from llmkeep.record.runs import recorded, whole_run

INVENTORY = "/etc/llmkeep/inventory"


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep patch`."""
    parser = subparsers.add_parser(
        "patch",
        parents=[whole_run(INVENTORY)],
        help="install newer Debian packages on the hosts",
        description=__doc__,
    )
    parser.add_argument("--hosts", dest="limit", metavar="HOST,HOST", help="only these")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the steps and the vulnerabilities that they fix; change nothing",
    )
    parser.add_argument(
        "--back", action="store_true", help="roll back to the packages that the last patch replaced"
    )
    parser.add_argument(
        "--canary-key-file",
        type=Path,
        metavar="FILE",
        help="on the control node: file of identities.yml with a key that may use the models; needed if hosts serve",
    )
    parser.add_argument(
        "--last-instance",
        action="store_true",
        help="also patch a host if no other host serves its model: clients wait, or are refused",
    )
    parser.add_argument(
        "--without-rollback",
        action="store_true",
        help="also if former packages are in no archive, such as those of Debian's installer",
    )
    parser.add_argument("--no-reboot", action="store_true", help="do not reboot hosts: an operator does")
    parser.set_defaults(run=_patch)


def _patch(arguments: argparse.Namespace) -> int:
    tree = source_tree.located()
    playbook = (tree / "playbooks/patch.yml").resolve()
    places = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    options: dict[str, object] = {
        "patch_only_plan": arguments.plan,
        "patch_back": arguments.back,
        "patch_last_instance": arguments.last_instance,
        "patch_without_rollback": arguments.without_rollback,
        "patch_reboot": not arguments.no_reboot,
    }
    if arguments.canary_key_file:
        options["patch_canary_key_file"] = str(arguments.canary_key_file.resolve())
    words = ["--extra-vars", json.dumps(options)]
    if arguments.limit:
        words += ["--limit", arguments.limit]
    with recorded(tree, playbook, places, arguments) as outcome:
        outcome.code, results = play(playbook, places, words)
        outcome.hosts, outcome.accepted = results.hosts, results.accepted
    if arguments.plan and outcome.code == 0:
        for line in software.plan(tree, places, arguments):
            print(printable(line))
    return outcome.code
