"""Filters of the playbooks."""

from __future__ import annotations

import base64
import ipaddress
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.llmkeep.estate.plugins.plugin_utils.inventory import full_names, limit_faults

SHOWN = 160  # characters; the report has it all


def locked_purls(lock: dict[str, Any]) -> list[str]:
    """Package URLs of what a bundle must carry of artifacts.lock.yml: packages and wheels.

    Not programs: a bundle is built without one that could not be had, and the estate does without it. Nor models: each profile
    has its own, and those that an inventory needs are asked for by their folders.
    """
    wheels = {key for name in ("control", "serving") for key in lock["environments"].get(name, [])}
    purls = [lock["wheels"][key]["purl"] for key in wheels]
    purls += [artifact["purl"] for artifact in lock["debs"].values()]
    return sorted(purls)


def roles_of(features: list[dict[str, str]], group_names: list[str]) -> list[str]:
    """Roles of a host that is in these groups, of the rows of meta/features.yml, whose `hosts` is a pattern of groups."""
    mine = {*group_names, "all"}
    roles: list[str] = []
    for row in features:
        terms = row["hosts"].split(":")
        unions = {term for term in terms if term[0] not in "&!"}
        intersections = {term[1:] for term in terms if term[0] == "&"}
        exclusions = {term[1:] for term in terms if term[0] == "!"}
        if unions & mine and intersections <= mine and not exclusions & mine:
            roles.append(row["role"])
    return roles


def failed_check(pair: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """One failed check of one host, as a line for people."""
    host, check = pair
    observed = check["observed"] if len(check["observed"]) <= SHOWN else f"{check['observed'][:SHOWN]}…"
    return (
        f"{host['key']}: {check['id']} ({check['title']}): expected {check['expected']}; observed {observed}"
    )


def unenforceable_check(pair: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """One check that its host's kernel has no means for, as a line for people."""
    host, check = pair
    return f"{host['key']}: {check['id']}: {check['not_enforceable']}"


def accepted_check(pair: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """One check that does not hold and that the inventory accepts, as a line for people."""
    host, check = pair
    return f"{host['key']}: {check['id']}: {check['accepted']}"


def pkcs11_key_file(uri: str) -> str:
    """A file that OpenSSL's pkcs11-provider reads as the key that a URI names: DER of its version and the URI, as PEM."""
    version, place = b"PKCS#11 Provider URI v1.0", uri.encode()
    if len(version) + len(place) > 120:
        raise ValueError(f"the URI {uri} has {len(place)} bytes: take shorter labels for token and key")
    parts = bytes([0x1A, len(version)]) + version + bytes([0x0C, len(place)]) + place
    body = base64.b64encode(bytes([0x30, len(parts)]) + parts).decode()
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    return "\n".join(
        ["-----BEGIN PKCS#11 PROVIDER URI-----", *lines, "-----END PKCS#11 PROVIDER URI-----", ""]
    )


def mount_unit(path: str) -> str:
    """Name of the unit that mounts a path, as `systemd-escape --path --suffix=mount` has it."""
    words = path.strip("/")
    if not words or words != posixpath.normpath(words):
        raise ValueError(
            f"{path!r} is not a valid mount point: give an absolute path without dots and double slashes"
        )
    escaped = re.sub(
        r"[^A-Za-z0-9:_./]", lambda match: "".join(f"\\x{byte:02x}" for byte in match[0].encode()), words
    )
    return ("\\x2e" + escaped[1:] if escaped.startswith(".") else escaped).replace("/", "-") + ".mount"


def reduced_inventory(
    hostvars: Mapping[str, Any], groups: Mapping[str, list[str]], variables: list[str], children: list[str]
) -> dict[str, Any]:
    """An inventory of all hosts, with those of VARIABLES that they have, in the groups CHILDREN alone."""
    hosts = {
        host: {name: hostvars[host][name] for name in variables if name in hostvars[host]}
        for host in sorted(groups["all"])
    }
    members: dict[str, dict[str, dict[str, Any]]] = {
        group: {"hosts": {host: {} for host in groups.get(group, [])}} for group in children
    }
    return {"all": {"hosts": hosts, "children": members}}


def locked_out(
    hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[str]], source: str
) -> list[str]:
    """Hosts whose firewall (role base) refuses SSH from SOURCE, an address; none if it is empty, as without SSH."""
    if not source:
        return []
    address = ipaddress.ip_address(source)
    control = [str(hostvars[host]["ansible_host"]) for host in groups["control"]]
    return [
        host
        for host in groups["all"]
        if not any(
            address in ipaddress.ip_network(allowed, strict=False)
            for allowed in (*control, *hostvars[host].get("base_ssh_from", []))
        )
    ]


def not_mirrored(control: str, mirror: str) -> list[str]:
    """What the control node serves and the mirror does not, by what playbooks/mirrored.yml reads on each: lines of sha256sum, and
    the bundle's serial.
    """

    def serving(lines: str) -> tuple[dict[str, str], str]:
        digests = {
            folder: digest for digest, folder in re.findall(r"(?m)^([0-9a-f]{64})  ([^/\n]+/[^/\n]+)", lines)
        }
        serial = re.search(r"(?m)^serial ([0-9]+)", lines)
        return digests, serial[1] if serial else "none"

    (expected, serial), (observed, standing) = serving(control), serving(mirror)
    bundles = {"bundle/current": f"bundle {serial} (it has {standing})"}
    return [
        bundles.get(folder, folder) for folder, digest in expected.items() if observed.get(folder) != digest
    ]


def outside(addresses: list[str], networks: list[str]) -> list[str]:
    """Those of the addresses that are in none of the networks, each written as an address in it and its prefix."""
    known = [ipaddress.ip_network(network, strict=False) for network in networks]
    return [
        address for address in addresses if not any(ipaddress.ip_address(address) in each for each in known)
    ]


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "locked_purls": locked_purls,
            "failed_check": failed_check,
            "unenforceable_check": unenforceable_check,
            "accepted_check": accepted_check,
            "full_names": full_names,
            "limit_faults": lambda limit, names: list(limit_faults(limit, names)),
            "locked_out": locked_out,
            "outside": outside,
            "mount_unit": mount_unit,
            "not_mirrored": not_mirrored,
            "pkcs11_key_file": pkcs11_key_file,
            "reduced_inventory": reduced_inventory,
            "roles_of": roles_of,
        }
