"""Filters of role luks and of the playbooks that change its volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.text.formatters import human_to_bytes


def swap_disks(luks_swap: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, serial and size in bytes of each swap, as llmkeep-volumes reads them."""
    return [
        {"name": swap["name"], "serial": swap["serial"], "size": human_to_bytes(swap["size"])}
        for swap in luks_swap
    ]


def volume_escrow(luks_volumes: list[dict[str, Any]], host: str, stored: dict[str, Any]) -> dict[str, Any]:
    """What the control node stores of each of a host's volumes, by name; STORED is by C(HOST/NAME)."""
    return {volume["name"]: stored.get(f"{host}/{volume['name']}", {}) for volume in luks_volumes}


def key_labels(hostvars: Mapping[str, Any], hosts: list[str]) -> list[str]:
    """Label of each host's key in the HSM: the inventory's, or the host's name."""
    return [str(hostvars[host].get("hsm_key_label", host)) for host in hosts]


PIN, TOKENS = "llmkeep.hsm-pin", {"hsm_token": "llmkeep", "hsm_spare_token": "llmkeep-spare"}


def hsm_pins(hosts: list[str], hostvars: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The PINs of the hosts' tokens, each once: C(home) names its credential on the control node, C(name) that beside the lab's
    double, C(tokens) the labels that it opens. Raises AnsibleFilterError where two PINs are said to open one token."""
    by_home: dict[str, dict[str, Any]] = {}
    for host in hosts:
        home = str(hostvars[host].get("hsm_pin", PIN))
        tokens = [hostvars[host].get(name, default) for name, default in TOKENS.items()]
        pin = by_home.setdefault(
            home, {"home": home, "name": home.replace(PIN, "softhsm.user-pin"), "tokens": []}
        )
        pin["tokens"] += [token for token in tokens if token and token not in pin["tokens"]]
    every = [token for pin in by_home.values() for token in pin["tokens"]]
    if twice := sorted({token for token in every if every.count(token) > 1}):
        names = [pin["home"] for pin in by_home.values() if twice[0] in pin["tokens"]]
        raise AnsibleFilterError(
            f"the token {twice[0]} has the PINs {', '.join(names)}: hosts with an hsm_pin of their own need an hsm_token and an "
            "hsm_spare_token of their own"
        )
    return list(by_home.values())


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "hsm_pins": hsm_pins,
            "key_labels": key_labels,
            "swap_disks": swap_disks,
            "volume_escrow": volume_escrow,
        }
