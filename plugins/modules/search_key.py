#!/usr/bin/python
"""State module: one holder's API key of Elasticsearch, with the permissions that are declared."""

from __future__ import annotations

DOCUMENTATION = r"""
module: search_key
short_description: Issue an API key of Elasticsearch to a host, which alone can read it
description:
  - With I(credential) it runs on the holder, changes nothing, and returns what the other call needs to know of it.
  - With I(name) it runs on the host of Elasticsearch. A key of this name is issued unless the one that the holder has
    is valid and has the roles; other keys of this name are revoked. The new one is returned encrypted to the holder's
    certificate, for M(llmkeep.estate.sealed_secret).
author: [llmkeep contributors (@llmkeep)]
options:
  credential: {description: Name of the holder's sealed credential., type: str}
  certificate_file: {description: Certificate of the holder., type: path, default: /etc/llmkeep/pki/host.pem}
  name: {description: Name of the key., type: str}
  roles: {description: Role descriptors of the key., type: dict}
  holder: {description: What the call on the holder returned., type: dict}
"""

EXAMPLES = r"""
- name: Look for the key on this host
  llmkeep.estate.search_key:
    credential: filebeat.key
  register: held
- name: Issue it
  llmkeep.estate.search_key:
    name: filebeat-llm1
    roles: {logs: {cluster: [], indices: []}}
    holder: "{{ held.holder }}"
  delegate_to: search1
  register: issued
"""

RETURN = r"""
holder: {description: "SHA-256 of the key that is held, empty without one, and the certificate.", returned: always, type: dict}
cms: {description: The new key encrypted to the holder; empty if none was issued., returned: always, type: str}
"""

import hashlib
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.search import ask

STORE = Path("/etc/credstore.encrypted")


def held(credential: str, certificate: Path) -> dict[str, str]:
    """What the holder has."""
    path = STORE / credential
    secret = sealing.unseal(credential, path.read_bytes()) if path.exists() else b""
    return {
        "sha256": hashlib.sha256(secret).hexdigest() if secret else "",
        "certificate": certificate.read_text() if certificate.exists() else "",
    }


def issued(name: str, roles: dict[str, Any], holder: dict[str, str], check: bool) -> tuple[bool, str]:
    """Whether a key had to be issued or revoked, and the new one as CMS."""
    keys = ask.do("GET", f"/_security/api_key?name={name}&active_only=true")["api_keys"]
    valid = [
        key["id"]
        for key in keys
        if key.get("metadata", {}).get("sha256") == holder["sha256"]
        and ask.has(key["role_descriptors"], roles)
    ]
    others = [key["id"] for key in keys if key["id"] not in valid]
    cms = ""
    if not check:
        if not valid:
            cms = issue(name, roles, holder["certificate"])
        if others:
            ask.do("DELETE", "/_security/api_key", {"ids": others})
    return bool(others or not valid), cms


def issue(name: str, roles: dict[str, Any], certificate: str) -> str:
    """A new key, encrypted to its holder. Elasticsearch keeps the hash of what is handed over, by which it is known again."""
    key = ask.do("POST", "/_security/api_key", {"name": name, "role_descriptors": roles})
    secret = f"{key['id']}:{key['api_key']}".encode()
    ask.do(
        "PUT", f"/_security/api_key/{key['id']}", {"metadata": {"sha256": hashlib.sha256(secret).hexdigest()}}
    )
    cms: str = sealing.encrypted_to(certificate, secret)
    return cms


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "credential": {"type": "str"},
            "certificate_file": {"type": "path", "default": "/etc/llmkeep/pki/host.pem"},
            "name": {"type": "str"},
            "roles": {"type": "dict"},
            "holder": {"type": "dict"},
        },
        mutually_exclusive=[("credential", "name")],
        required_one_of=[("credential", "name")],
        required_together=[("name", "roles", "holder")],
        supports_check_mode=True,
    )
    given = module.params
    try:
        if given["credential"]:
            module.exit_json(
                changed=False, holder=held(given["credential"], Path(given["certificate_file"])), cms=""
            )
        if module.check_mode and not ask.there():
            module.exit_json(changed=True, holder=given["holder"], cms="")
        changed, cms = issued(given["name"], given["roles"], given["holder"], module.check_mode)
    except (ask.Refused, sealing.Failed, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=changed, holder=given["holder"], cms=cms)


if __name__ == "__main__":
    main()
