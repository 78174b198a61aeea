"""`llmkeep inventory check`: faults of an inventory, found without contacting a host.

It reads the inventory as a run would and prints one line per fault, with the hosts that share it and the way out.

Exit codes: 0 no fault; 1 faults, or not an inventory in YAML.
"""

import argparse
import json
from pathlib import Path

from llmkeep import source_tree
from llmkeep.playbooks import inventory_path, play


def faults(inventories: list[Path], root: Path) -> list[str]:
    """Faults of the inventories together, one line each; in Ansible's words where it cannot read them."""
    code, heard = play(root / "playbooks/check-inventory.yml", inventories, [], quiet=True)
    return heard.faults or (heard.failures or heard.complaints) * code


def _check(given: argparse.Namespace) -> int:
    root = source_tree.located()
    inventories = [inventory_path(place, root) for place in given.inventory]
    found = faults(inventories, root)
    if given.json:
        print(json.dumps({"ok": not found, "faults": found}, indent=2))
    elif found:
        print("\n".join(f"- {fault}" for fault in found))
    else:
        print(f"{', '.join(map(str, inventories))}: no fault found; no host was contacted")
    return int(bool(found))


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep inventory check`."""
    parser = subparsers.add_parser("inventory", help="check an inventory offline", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("check", help="print its faults; contacts no host", description=__doc__)
    verb.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    verb.add_argument("--json", action="store_true", help="print JSON and nothing else")
    verb.set_defaults(run=_check)
