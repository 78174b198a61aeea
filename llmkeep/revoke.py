"""`llmkeep pki revoke | reinstate | crl`: revoke on the control node, and have every host honour it at once.

Exit codes: 0 done, on all hosts; 1 refused, nothing was changed; 3 done here, but a host was not reached: run it again.
"""

import argparse
from collections.abc import Callable

from llmkeep.pki import authority, revoking
from llmkeep.pki.authority import told
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path, play, verified_tree
from llmkeep.record.runs import recorded, who, whole_run

# What the role pki writes for the renewal: all hosts, with their addresses.
INVENTORY = "/etc/llmkeep/renew/hosts.yml"
HOSTS_MISSING = 3


def _distributed(verb: Callable[[Places, str, str, str], str], given: argparse.Namespace) -> int:
    """Change the record and the list, then bring the list to all hosts."""
    tree = verified_tree()
    playbook = (tree / "playbooks/revoke.yml").resolve()
    inventories = [inventory_path(place, tree) for place in given.inventory or [INVENTORY]]
    event: dict[str, object] = {
        "event.action": f"pki {verb.__name__} {given.name}",
        "event.reason": given.reason,
    }
    with recorded(tree, playbook, inventories, given, event) as outcome:
        print(verb(given.places, given.name, given.reason, who()), flush=True)
        outcome.code, heard = play(playbook, inventories, [])
        outcome.hosts = heard.hosts
    return outcome.code and (130 if outcome.code == 130 else HOSTS_MISSING)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep pki …` with its verbs that run Ansible."""
    verbs = authority.register(subparsers)
    common = whole_run(INVENTORY)
    common.add_argument("name", help="as `llmkeep pki sign --host` had it: a host's name in the inventory")
    common.add_argument("--reason", required=True, help="for the readers of the record")
    common.set_defaults(places=Places())
    for verb, text in (
        (revoking.revoke, "revoke all certificates of a name, and shut it out of every host"),
        (revoking.reinstate, "let a revoked name have certificates again"),
    ):
        parser = verbs.add_parser(verb.__name__, parents=[common], help=text, description=__doc__)
        parser.set_defaults(run=lambda given, verb=verb: _distributed(verb, given))
    parser = verbs.add_parser(
        "crl", help="renew the revocation list if it has to be (site.yml and the renewal call it)"
    )
    parser.set_defaults(run=told(lambda given: str(revoking.publish(given.places))))
