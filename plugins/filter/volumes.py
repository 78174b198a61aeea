"""Filters of role luks and of the playbooks that change its volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"key_labels": key_labels, "swap_disks": swap_disks, "volume_escrow": volume_escrow}
