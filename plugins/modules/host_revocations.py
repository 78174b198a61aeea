#!/usr/bin/python
"""State module: the revocation lists on a host, and the addresses of revoked hosts in its firewall."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_revocations
short_description: Install the control node's signed revocation lists, and block revoked hosts
description:
  - Writes the lists to C(crl.pem) and the probe (a certificate that is revoked from the start, with its key) to
    C(revoked.pem) in I(directory), and reloads the services that are named in C(reload.d).
  - Drops all packets from revoked hosts, also on established connections, by a file that the firewall includes. Replies on
    SSH connections to them are accepted. nftables.service is marked pending for M(llmkeep.estate.systemd_units).
  - Never replaces a list by one with a lower number, so that a concurrent run cannot undo a revocation.
author: [llmkeep contributors (@llmkeep)]
options:
  published: {description: "The published PEM file: the lists, then the probe.", type: str, required: true}
  hosts: {description: Address by name of each host of the estate., type: dict, required: true}
  spared:
    description: Addresses that are never blocked, this host's and the control node's.
    type: list
    elements: str
    default: []
  directory: {description: Directory of the lists., type: path, default: /etc/llmkeep/pki}
  firewall: {description: The file that the firewall includes., type: path, default: /etc/nftables.d/refuse-input-revoked.nft}
"""

EXAMPLES = r"""
- name: Install the revocation lists
  llmkeep.estate.host_revocations:
    published: "{{ read_on_the_control_node.stdout }}"
    hosts: {llm1: 10.77.0.12, train1: 10.77.0.13}
"""

RETURN = r"""
revoked: {description: The revoked names., returned: always, type: list, elements: str}
"""

import ipaddress
import re
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config.units import Refused, must

RELOAD_UNIT = "llmkeep-certificate.service"
LISTS = re.compile(r"\A(?:# revoked: .+\n)*(?:-----BEGIN X509 CRL-----[^-]+-----END X509 CRL-----\n){2}")
FIREWALL = """{family} saddr {address} tcp sport 22 ct state established ct direction reply accept
{family} saddr {address} counter name refused_in drop
"""


def number_of(lists: str) -> int:
    """Number of the first list, which is the issuing CA's."""
    argv = ["openssl", "crl", "-noout", "-crlnumber"]
    done = subprocess.run(argv, input=lists, capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r"crlNumber=(?:0x)?([0-9A-Fa-f]+)", done.stdout)
    if not match:
        raise Refused(
            f"openssl finds no number in the revocation list: {done.stderr.strip() or done.stdout.strip()};"
            " look at `llmkeep pki crl` on the control node"
        )
    return int(match[1], 16)


def rules(addresses: list[str]) -> str:
    """What the firewall includes; empty without addresses."""
    try:
        known = sorted({ipaddress.ip_address(address) for address in addresses}, key=str)
    except ValueError as error:
        raise Refused(
            f"{error}: ansible_host of a revoked host must be an address, for the firewall"
        ) from None
    return "".join(
        FIREWALL.format(family="ip6" if address.version == 6 else "ip", address=address) for address in known
    )


def revoked_in(lists: str) -> list[str]:
    """The names that the control node wrote above the lists."""
    return re.findall(r"^# revoked: (.+)$", lists, re.MULTILINE)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def settle(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    text = params["published"].replace("\r\n", "\n").rstrip("\n") + "\n"
    lists = LISTS.match(text)
    if not lists:
        raise Refused(
            "the control node published no revocation lists; run `llmkeep pki crl` there, which names the reason"
        )
    place, probe = Path(params["directory"]) / "crl.pem", Path(params["directory"]) / "revoked.pem"
    firewall, before = Path(params["firewall"]), text_of(place)
    if before and number_of(before) > number_of(lists[0]):
        return {"changed": False, "revoked": revoked_in(before)}
    revoked, new_probe_text = revoked_in(lists[0]), text[lists.end() :]
    addresses = {params["hosts"][name] for name in revoked if name in params["hosts"]}
    wanted_rules = rules(sorted(addresses - set(params["spared"])))
    new_rules, new_lists = text_of(firewall) != wanted_rules, before != lists[0]
    new_probe = text_of(probe) != new_probe_text
    if new_rules and not check:
        atomic.mark_pending(["nftables.service"])
        if wanted_rules:
            atomic.write_file(firewall, wanted_rules.encode(), 0, 0, 0o644)
        else:
            atomic.remove(firewall)
    if new_probe and not check:
        atomic.write_file(probe, new_probe_text.encode(), 0, 0, 0o600)
    if new_lists and not check:
        atomic.write_file(place, lists[0].encode(), 0, 0, 0o644)
        # The path unit would do it a moment later; by waiting here, what follows sees the lists honoured.
        must(RELOAD_UNIT, "restart")
    return {"changed": new_rules or new_lists or new_probe, "revoked": revoked}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "published": {"type": "str", "required": True},
            "hosts": {"type": "dict", "required": True},
            "spared": {"type": "list", "elements": "str", "default": []},
            "directory": {"type": "path", "default": "/etc/llmkeep/pki"},
            "firewall": {"type": "path", "default": "/etc/nftables.d/refuse-input-revoked.nft"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**settle(module.params, module.check_mode))
    except Refused as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
