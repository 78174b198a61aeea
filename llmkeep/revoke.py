"""`llmkeep pki revoke | reinstate | crl`: revoke on the control node, and distribute the list to every host at once.

`llmkeep pki request | install`: an edge's certificate from another CA, which `llmkeep site` installs on the edge.

Exit codes: 0 done, on all hosts; 1 refused, nothing was changed; 3 done here, but a host was not reached: run it again.

"""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from llmkeep import source_tree
from llmkeep.pki import authority, edges, revoking
from llmkeep.pki.authority import as_command
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path, play, verified_tree
from llmkeep.record import runs
from llmkeep.record.runs import recorded, who, whole_run

# What the role pki writes for the renewal: all hosts, with their addresses.
INVENTORY = "/etc/llmkeep/renew/hosts.yml"
HOSTS_MISSING = 3


def _distributed(verb: Callable[[Places, str, str, str], str], arguments: argparse.Namespace) -> int:
    """Change the record and the list, then distribute the list to all hosts."""
    tree = verified_tree()
    playbook = (tree / "playbooks/revoke.yml").resolve()
    inventories = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    event: dict[str, object] = {
        "event.action": f"pki {verb.__name__} {arguments.name}",
        "event.reason": arguments.reason,
    }
    with recorded(tree, playbook, inventories, arguments, event) as outcome:
        print(verb(arguments.places, arguments.name, arguments.reason, who()), flush=True)
        outcome.code, results = play(playbook, inventories, [])
        outcome.hosts = results.hosts
    return outcome.code and (130 if outcome.code == 130 else HOSTS_MISSING)


def _record(action: str, host: str, more: runs.Event) -> None:
    """Record a change of an edge's data before it is stored. A developer's machine has no record."""
    if runs.is_kept(source_tree.located()):
        runs.append(
            {
                "event.kind": "event",
                "event.category": ["configuration"],
                "event.type": ["change"],
                "event.action": f"pki {action} {host}",
                "event.outcome": "success",
                "user.name": who(),
                **more,
            }
        )


def _request(arguments: argparse.Namespace) -> str:
    if arguments.csr:
        csr = (
            sys.stdin.buffer.read(edges.LARGEST_REQUEST + 1)
            if arguments.csr == "-"
            else Path(arguments.csr).read_bytes()
        )
        names = [name for name in arguments.names.split(",") if name]
        return edges.accept(arguments.places, arguments.host, names, csr, arguments.hsm)
    if arguments.new_key:
        edge = edges.retire(arguments.places, arguments.host)
        _record("request --new-key", arguments.host, {"llmkeep.key.sha256": edge.key})
        edge.write(arguments.places, arguments.host)
        return (
            f"{arguments.host} makes a new key and request with the next `llmkeep site`, and serves today's certificate until "
            "the new one is installed"
        )
    return edges.hand_out(arguments.places, arguments.host)


def _install(arguments: argparse.Namespace) -> str:
    host, root = arguments.host, arguments.root.read_bytes() if arguments.root else None
    before = edges.Edge.read(arguments.places, host)
    edge = edges.install(arguments.places, host, arguments.chain.read_bytes(), root, datetime.now(UTC))
    if edge == before:
        return f"{host} already has this certificate; next: llmkeep site"
    _record("install", host, edges.described(edge))
    edge.write(arguments.places, host)
    return f"the certificate is valid for {', '.join(edge.names)}; next: llmkeep site, which installs it on {host}"


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep pki …` with its verbs that run Ansible."""
    verbs = authority.register(subparsers)
    common = whole_run(INVENTORY)
    common.add_argument("name", help="a host's name in the inventory, as given to `llmkeep pki sign --host`")
    common.add_argument("--reason", required=True, help="for the readers of the record")
    common.set_defaults(places=Places())
    for verb, text in (
        (revoking.revoke, "revoke all certificates of a name, and exclude it from every host"),
        (revoking.reinstate, "allow certificates for a revoked name again"),
    ):
        parser = verbs.add_parser(verb.__name__, parents=[common], help=text, description=__doc__)
        parser.set_defaults(run=lambda arguments, verb=verb: _distributed(verb, arguments))
    parser = verbs.add_parser(
        "crl", help="renew the revocation list if it is due (called by site.yml and the renewal)"
    )
    parser.set_defaults(run=as_command(lambda arguments: str(revoking.publish(arguments.places))))
    parser = verbs.add_parser(
        "request", help="print an edge's request for its public names (collected by site.yml)"
    )
    parser.add_argument("--host", required=True, help="the edge's name in the inventory")
    parser.add_argument(
        "--new-key", action="store_true", help="have the next site.yml make a new key and request"
    )
    parser.add_argument("--csr", help="used by site.yml: file with the host's request, - for standard input")
    parser.add_argument("--names", default="", help="used by site.yml: comma-separated edge_public_names")
    parser.add_argument("--hsm", action="store_true", help="used by site.yml: the key is in an HSM")
    parser.set_defaults(run=as_command(_request))
    parser = verbs.add_parser(
        "install",
        help="check a certificate that another CA issued for an edge's request; site.yml installs it",
    )
    parser.add_argument("--host", required=True, help="the edge's name in the inventory")
    parser.add_argument("--root", type=Path, help="certificate of that CA's root, if it is not in CHAIN")
    parser.add_argument("chain", type=Path, metavar="CHAIN", help="PEM: the edge's certificate and its chain")
    parser.set_defaults(run=as_command(_install))
