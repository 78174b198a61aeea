"""The hosts of a lab, read from an Ansible inventory in YAML."""

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lab.errors import BadInventory

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
KINDS = ("container", "kernel")  # the first is the default
SHARED = ("lab_kind", "lab_memory")  # that all hosts may have, under all.vars
MAX_DATA_DISKS = 14  # a host has 16 block devices: the first is its root, the last the medium


@dataclass(frozen=True)
class Disk:
    """A blank data disk: its serial, as the guest sees it, and its size in bytes."""

    serial: str
    size: int


@dataclass(frozen=True)
class Host:
    """One host of the lab. `kind` is one of KINDS, `memory` in bytes, `groups` those of the inventory, parents included."""

    name: str
    kind: str
    address: str
    memory: int
    disks: tuple[Disk, ...]
    groups: frozenset[str]


@dataclass(frozen=True)
class Lab:
    """A lab as the inventory describes it.

    `gateway` is the address of the sink (default gateway and resolver of every host), `seat` the source address
    of commands inside the namespace. `domain` is the estate's base_domain, None if the inventory leaves it to
    the roles' default.
    """

    network: ipaddress.IPv4Network
    gateway: str
    seat: str
    hosts: tuple[Host, ...]
    domain: str | None

    def host(self, name: str) -> Host:
        """The host of that name; BadInventory if there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts)
        raise BadInventory(f"no host is called {name!r} in this lab: it has {known}")

    def in_group(self, group: str) -> tuple[Host, ...]:
        """The hosts of a group, in the inventory's order."""
        return tuple(host for host in self.hosts if group in host.groups)


def size(text: object) -> int:
    """Bytes of a size such as 1536M or 8G (powers of 1024)."""
    match = re.fullmatch(r"([1-9][0-9]*)([KMGT])", str(text))
    if not match:
        raise BadInventory(f"{text!r} is not a size: write a whole number and K, M, G or T, such as 1536M")
    return int(match[1]) * UNITS[match[2]]


def read(paths: Iterable[Path]) -> Lab:
    """The lab described by one or more inventories (a file, or a folder, of which every .yml file is read, as by Ansible)."""
    facts: dict[str, dict[str, Any]] = {}
    groups: dict[str, set[str]] = {}
    variables: dict[str, Any] = {}
    for file in _files(paths):
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInventory(
                f"there is no inventory at {file}: name a folder with hosts.yml in it"
            ) from None
        except yaml.YAMLError as error:
            raise BadInventory(f"{file} is not YAML: {error}") from None
        if not isinstance(tree, dict):
            raise BadInventory(f"{file} has no groups at its top: write `all:` with `hosts:` and `children:`")
        for group, content in tree.items():
            _walk(group, content or {}, (), facts, groups, variables)
    try:
        network = ipaddress.IPv4Network(variables["lab_network"])
        gateway, seat = variables["lab_gateway"], variables["lab_seat"]
    except KeyError as error:
        raise BadInventory(f"the inventory does not set {error}: write it under all.vars") from None
    except ValueError as error:
        raise BadInventory(f"lab_network is not a network: {error}") from None
    shared = {"lab_kind": KINDS[0]} | {name: variables[name] for name in SHARED if name in variables}
    hosts = tuple(
        _host(name, shared | values, frozenset(groups[name]), network) for name, values in facts.items()
    )
    addresses = [host.address for host in hosts] + [gateway, seat]
    for address in addresses:
        if addresses.count(address) > 1:
            raise BadInventory(
                f"{address} is used twice: every host, lab_gateway and lab_seat need their own"
            )
    if not hosts:
        raise BadInventory("the inventory names no host with lab_memory: nothing to start")
    return Lab(network, gateway, seat, hosts, variables.get("base_domain"))


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from (sorted(path.glob("*.yml")) or [path / "hosts.yml"]) if path.is_dir() else [path]


def _walk(
    group: str,
    content: dict[str, Any],
    parents: tuple[str, ...],
    facts: dict[str, dict[str, Any]],
    groups: dict[str, set[str]],
    variables: dict[str, Any],
) -> None:
    if group == "all":
        variables.update(content.get("vars") or {})
    for name, values in (content.get("hosts") or {}).items():
        facts.setdefault(name, {}).update(values or {})
        groups.setdefault(name, set()).update(parents, {group})
    for child, inner in (content.get("children") or {}).items():
        _walk(child, inner or {}, (*parents, group), facts, groups, variables)


def _host(name: str, values: dict[str, Any], groups: frozenset[str], network: ipaddress.IPv4Network) -> Host:
    for variable in ("ansible_host", "lab_memory"):
        if variable not in values:
            raise BadInventory(f"host {name} has no {variable}: the lab cannot build it")
    try:
        address = ipaddress.IPv4Address(values["ansible_host"])
    except ValueError:
        raise BadInventory(f"ansible_host of {name} is {values['ansible_host']!r}: not an address") from None
    if address not in network:
        raise BadInventory(f"host {name} has {address}, outside lab_network {network}")
    disks = tuple(Disk(str(disk["serial"]), size(disk["size"])) for disk in values.get("lab_disks") or [])
    for disk in disks:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,20}", disk.serial):
            raise BadInventory(f"serial {disk.serial!r} of {name}: use 1 to 20 letters, digits, - and _")
    if len(disks) > MAX_DATA_DISKS:
        raise BadInventory(f"host {name} has {len(disks)} disks: at most {MAX_DATA_DISKS} fit")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name):
        raise BadInventory(f"host name {name!r}: use lower-case letters, digits and -, at most 32")
    kind = values["lab_kind"]
    if kind not in KINDS:
        raise BadInventory(f"lab_kind of {name} is {kind!r}: use {' or '.join(KINDS)}")
    if kind == "container" and (needs := _needs_a_kernel(values, groups)):
        raise BadInventory(f"{name} {needs}, and a container has none: set `lab_kind: kernel` for it")
    return Host(name, kind, str(address), size(values["lab_memory"]), disks, groups)


def _needs_a_kernel(values: dict[str, Any], groups: frozenset[str]) -> str:
    """Why a host cannot be a container; empty if it can."""
    if "storage" in groups or values.get("luks_volumes"):
        return "has encrypted volumes, which need device-mapper"
    if values.get("lab_disks"):
        return "has data disks, which need block devices of its own"
    if values.get("llm_training_encrypt"):
        return "encrypts what it says to other hosts that train, which needs ESP"
    return ""
