#!/usr/bin/python
"""State module: one holder's API key of Elasticsearch, with the permissions that are declared."""

from __future__ import annotations

DOCUMENTATION = r"""
module: search_key
short_description: Issue an API key or a service account's token of Elasticsearch to a host, which alone can read it
description:
  - With I(credential) it runs on the holder, changes nothing, and returns what the other call needs to know of it.
  - With I(name) it runs on the host of Elasticsearch. A key of this name is issued unless the one that the holder has
    is valid and has the roles; other keys of this name are revoked. The new one is returned encrypted to the holder's
    certificate, for M(llmkeep.estate.sealed_secret).
  - With I(service) it is a token of that service account instead. Elasticsearch keeps nothing beside a token but its name, so
    each one is issued by a name of its own, which a token has in it.
author: [llmkeep contributors (@llmkeep)]
options:
  credential: {description: Name of the holder's sealed credential., type: str}
  certificate_file: {description: Certificate of the holder., type: path, default: /etc/llmkeep/pki/host.pem}
  name: {description: Name of the key., type: str}
  roles: {description: Role descriptors of the key., type: dict}
  service: {description: "Service account that the token is of, such as C(elastic/kibana).", type: str}
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
holder:
  description: "SHA-256 of the key that is held, empty without one; its name, if it is a token; and the certificate."
  returned: always
  type: dict
cms: {description: The new key encrypted to the holder; empty if none was issued., returned: always, type: str}
"""

import base64
import hashlib
import re
import secrets
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
        "token": token_name(secret),
        "certificate": certificate.read_text() if certificate.exists() else "",
    }


def token_name(secret: bytes) -> str:
    """The name of a service account's token, out of `namespace/service/name:secret` in it, base64 without padding."""
    try:
        account, _, _ = (
            base64.b64decode(secret + b"=" * (-len(secret) % 4), validate=True)[4:].decode().partition(":")
        )
    except ValueError:
        return ""
    return account.rpartition("/")[2]


def issued_token(service: str, name: str, holder: dict[str, str], check: bool) -> tuple[bool, str]:
    """Whether a token had to be issued or revoked, and the new one as CMS."""
    account = f"/_security/service/{service}/credential"
    name = re.sub("[^A-Za-z0-9-]", "_", name)
    tokens = [token for token in ask.do("GET", account)["tokens"] if token.rpartition("_")[0] == name]
    others = [token for token in tokens if token != holder["token"]]
    cms = ""
    if not check:
        if holder["token"] not in tokens:
            new = ask.do("POST", f"{account}/token/{name}_{secrets.token_hex(4)}")["token"]["value"]
            cms = sealing.encrypted_to(holder["certificate"], new.encode())
        for token in others:
            ask.do("DELETE", f"{account}/token/{token}")
    return bool(others or holder["token"] not in tokens), cms


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
            "service": {"type": "str"},
            "holder": {"type": "dict"},
        },
        mutually_exclusive=[("credential", "name"), ("roles", "service")],
        required_one_of=[("credential", "name")],
        required_by={"name": ["holder"], "roles": ["name"], "service": ["name"]},
        required_if=[("credential", None, ("roles", "service"), True)],
        supports_check_mode=True,
    )
    parameters = module.params
    try:
        if parameters["credential"]:
            module.exit_json(
                changed=False,
                holder=held(parameters["credential"], Path(parameters["certificate_file"])),
                cms="",
            )
        if module.check_mode and not ask.there():
            module.exit_json(changed=True, holder=parameters["holder"], cms="")
        name, holder, check = parameters["name"], parameters["holder"], module.check_mode
        changed, cms = (
            issued_token(parameters["service"], name, holder, check)
            if parameters["service"]
            else issued(name, parameters["roles"], holder, check)
        )
    except (ask.Refused, sealing.Failed, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=changed, holder=parameters["holder"], cms=cms)


if __name__ == "__main__":
    main()
