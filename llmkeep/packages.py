"""`llmkeep packages list`: what hosts have installed, as a file of artifacts.d for the connected builder.

Debian's installer and operators leave packages that no role names, so the mirror has no newer versions of them. With the file
in its artifacts.d, `llmkeep lock update` takes each one that a source has, at its newest version, and names the others.
The file is not trusted: it can only have the builder take more of what its sources sign.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import yaml

from llmkeep import durable
from llmkeep.errors import LlmkeepError
from llmkeep.playbooks import inventory_path, play, verified_tree
from llmkeep.record.runs import recorded, whole_run

INVENTORY = "/etc/llmkeep/inventory"
PRINTED = "List installed packages"  # task of playbooks/packages.yml
INSTALLED = re.compile(r"[hi]i.?\t([a-z0-9][a-z0-9+.-]{0,126})")  # or on hold
MOST_BYTES = 4 << 20  # of one host: some 100,000 packages
MOST_QUOTED = 100
HEADER = """\
# What hosts had installed, by `llmkeep packages list`: copy it to the builder's artifacts.d, and run `llmkeep lock update` there.
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep packages list`."""
    verbs = subparsers.add_parser("packages", help="Debian packages of the hosts").add_subparsers(
        required=True
    )
    parser = verbs.add_parser(
        "list",
        parents=[whole_run(INVENTORY)],
        help="packages of all hosts, for the builder",
        description=__doc__,
    )
    parser.add_argument("--out", type=Path, help="file to write (default: standard output)")
    parser.set_defaults(run=_list)


def _list(arguments: argparse.Namespace) -> int:
    tree = verified_tree()
    playbook = (tree / "playbooks/packages.yml").resolve()
    places = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    with recorded(
        tree, playbook, places, arguments, {"event.action": "packages list", "event.type": ["info"]}
    ) as outcome:
        outcome.code, results = play(
            playbook, places, [], quiet=True, asked=frozenset({PRINTED}), most_bytes=MOST_BYTES
        )
        outcome.hosts = results.hosts
    if outcome.code or not results.outputs:
        listed = "\n".join(f"- {each}" for each in results.failures or results.complaints)
        raise LlmkeepError(
            f"not all hosts answered, and without some the list would lack what only they have:\n{listed}\n"
            "Run this again when all answer, or take a host that is gone for good out of the inventory"
        )
    hosts = {host: names(host, text) for (_, host), text in results.outputs.items()}
    text = document(hosts)
    if arguments.out:
        durable.write(arguments.out, text.encode(), 0o644)
        print(
            f"{arguments.out}: {len(set().union(*hosts.values()))} packages of {len(hosts)} hosts",
            file=sys.stderr,
        )
    else:
        sys.stdout.write(text)
    return 0


def names(host: str, text: str) -> set[str]:
    """The packages that dpkg calls installed; LlmkeepError for a line that is not dpkg's."""
    packages = set()
    for line in text.splitlines():
        if line[1:2] != "i":
            continue  # removed, but for its configuration
        if not (match := INSTALLED.fullmatch(line)):
            raise LlmkeepError(
                f"{host} printed {line[:MOST_QUOTED]!r}, which is no line of dpkg's: look at it"
            )
        packages.add(match[1])
    if not packages:
        raise LlmkeepError(f"{host} has no package, by its dpkg: look at it")
    return packages


def document(hosts: dict[str, set[str]]) -> str:
    """A file of artifacts.d; those that not all hosts have name theirs in a comment."""
    having: dict[str, list[str]] = defaultdict(list)
    for host, packages in sorted(hosts.items()):
        for package in packages:
            having[package].append(host)
    lines = [HEADER, "apt:\n  installed:\n"]
    for package, some in sorted(having.items()):
        comment = f"  # {', '.join(some)}" if len(some) < len(hosts) else ""
        lines.append(f"    - {yaml.safe_dump(package, width=1000).splitlines()[0]}{comment}\n")
    return "".join(lines)
