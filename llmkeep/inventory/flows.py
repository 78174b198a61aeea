"""The connections of an estate, derived from the roles' own firewall rules: hosts, and the ports they open to each other."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import LlmkeepError
from llmkeep.playbooks import verified_tree

MOST_BOXES = 20  # of hosts that are drawn one by one
CLIENTS = "clients"
OWN = (
    "ansible_host",
    "luks_volumes",
    "luks_swap",
    "pki_extra_names",
)  # differ between hosts with the same rules


@dataclass(frozen=True)
class Box:
    """A host, several with the same groups, or a machine outside of the estate, which has no groups."""

    title: str
    address: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flow:
    """Each of SOURCES connects to each of TARGETS, itself excepted; a box of several hosts in both connects within itself."""

    port: str
    label: str  # the variable that has the port, or the role that opens it
    sources: tuple[Box, ...]
    targets: tuple[Box, ...]


@dataclass(frozen=True)
class Estate:
    """BOXES in the order of the inventory, outside machines last. `unread`: rules that depend on data only a host has."""

    boxes: tuple[Box, ...]
    flows: tuple[Flow, ...]
    unread: tuple[str, ...]


def features(root: Path) -> list[dict[str, Any]]:
    """Rows of meta/features.yml."""
    rows: list[dict[str, Any]] = yaml.safe_load((root / "meta/features.yml").read_text())["features"]
    return rows


def members(listing: dict[str, Any], group: str) -> list[str]:
    """Hosts of a group and of its children, from `ansible-inventory --list`."""
    row = listing.get(group, {})
    children = [host for child in row.get("children", []) for host in members(listing, child)]
    return list(dict.fromkeys([*row.get("hosts", []), *children]))


def estate(listing: dict[str, Any]) -> Estate:
    """Boxes and flows of an inventory without a fault, given as `ansible-inventory --list` prints it."""
    root = verified_tree()
    hosts = members(listing, "all")
    groups = {name: members(listing, name) for name in listing if name != "_meta"} | {"all": hosts}
    hostvars = {host: listing["_meta"]["hostvars"].get(host, {}) for host in hosts}
    alone = len(hosts) <= MOST_BOXES
    mine = {host: tuple(name for name in groups if host in groups[name]) for host in hosts}
    representatives: dict[object, str] = {}
    for host in hosts:
        values = {name: value for name, value in hostvars[host].items() if name not in OWN}
        alike = host if alone else (mine[host], json.dumps(values, sort_keys=True))
        representatives.setdefault(alike, host)
    rendered = _rendered(root, groups, hostvars, [*representatives.values()])
    addresses: dict[str, str] = rendered["addresses"]
    boxes = _boxes(mine, addresses, alone)
    at = {address: boxes[host] for host, address in addresses.items()}
    pairs: dict[tuple[str, str], dict[Box, dict[Box, None]]] = {}  # dicts keep the order, sets do not
    outside: dict[Box, None] = {}
    for rule in rendered["rules"]:
        own, address = boxes[rule["host"]], rule["address"]
        if address == addresses[rule["host"]]:
            continue
        if rule["direction"] == "in" and address in at:  # the rule of the other host shows it
            continue
        other = at.get(address) or Box(*_outsider(address, hostvars[rule["host"]]))
        if address not in at:
            outside.setdefault(other)
        source, target = (own, other) if rule["direction"] == "out" else (other, own)
        key = rule["port"], rule["variables"][0] if len(rule["variables"]) == 1 else rule["role"]
        pairs.setdefault(key, {}).setdefault(source, {}).setdefault(target)
    every = (*dict.fromkeys(boxes.values()), *outside)
    flows = [flow for key, targets in pairs.items() for flow in _flows(*key, targets, every)]
    unread = dict.fromkeys(f"rules of role {row['role']}: {row['reason']}" for row in rendered["unread"])
    return Estate(every, tuple(flows), tuple(unread))


def _boxes(mine: dict[str, tuple[str, ...]], addresses: dict[str, str], alone: bool) -> dict[str, Box]:
    """The box of each host: its own, or one shared by all hosts with the same groups."""
    alike: dict[object, list[str]] = {}
    for host, groups in mine.items():
        alike.setdefault(host if alone else groups, []).append(host)
    boxes: dict[str, Box] = {}
    for first, *others in alike.values():
        title = f"{first} to {others[-1]}: {len(others) + 1} hosts" if others else first
        groups = tuple(group for group in mine[first] if group not in ("all", "ungrouped"))
        boxes |= dict.fromkeys([first, *others], Box(title, "" if others else addresses[first], groups))
    return {host: boxes[host] for host in mine}


def _outsider(address: str, values: dict[str, Any]) -> tuple[str, str]:
    """Title and address of a machine outside of the estate; the title is the variable that names it."""
    if not address:
        return CLIENTS, ""
    # A port may follow an IPv4 address; after an IPv6 address a colon makes it another one.
    end = r"(?![\w:])" if ":" in address else r"(?!\w|\.\d)"
    exact = re.compile(rf"(?<![\w.:]){re.escape(address)}{end}")
    naming = [name for name, value in values.items() if exact.search(json.dumps(value))]
    naming.sort(key=lambda name: (name.startswith("base_open_"), name))
    return (naming[0] if naming else address), address


def _flows(
    port: str, label: str, targets: dict[Box, dict[Box, None]], order: tuple[Box, ...]
) -> Iterable[Flow]:
    """One flow if all sources reach the same targets except themselves; else one per set of targets."""
    every = {target for reached in targets.values() for target in reached}
    alike: dict[frozenset[Box], list[Box]] = {frozenset(every): [*targets]}
    if any(every - {source} != {*reached} - {source} for source, reached in targets.items()):
        alike = {}
        for source, reached in targets.items():
            alike.setdefault(frozenset(reached), []).append(source)
    for reached_by_all, sources in alike.items():
        yield Flow(
            port,
            label,
            tuple(sorted((box for box in order if box in sources), key=lambda box: bool(box.groups))),
            tuple(box for box in order if box in reached_by_all),
        )


def _rendered(
    root: Path, groups: dict[str, list[str]], hostvars: dict[str, Any], hosts: list[str]
) -> dict[str, Any]:
    """What rules.py prints."""
    with tempfile.TemporaryDirectory(prefix="llmkeep-rules-") as folder:
        collection = Path(folder) / "ansible_collections/llmkeep/estate"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(root)
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": folder,
            "ANSIBLE_LOCAL_TEMP": folder,
            "PYTHONHASHSEED": "0",  # Ansible's filters on sets give one order
        }
        done = subprocess.run(
            # Without bytecode, since the tree stays as it was signed, and without the working directory's modules.
            [sys.executable, "-B", "-P", str(Path(__file__).with_name("rules.py"))],
            input=json.dumps({"root": str(root), "groups": groups, "hostvars": hostvars, "hosts": hosts}),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    if done.returncode:
        raise LlmkeepError(
            f"the rules of the roles cannot be rendered ({done.stderr.strip().rpartition('\n')[2]}): check the inventory "
            "with `llmkeep inventory check`"
        )
    rendered: dict[str, Any] = json.loads(done.stdout)
    return rendered
