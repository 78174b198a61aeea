#!/usr/bin/python
"""State module: an edge's key for its public names, and a certificate of another CA; only requests and certificates travel."""

from __future__ import annotations

DOCUMENTATION = r"""
module: public_certificate
short_description: Manage an edge's certificate of another CA, and return the request for one
description:
  - Generates the key C(public.key) on the host if there is none, or if it was retired.
  - Installs a certificate for it as C(public.pem), which holds the chain and the key, so that one rename replaces both.
    With a new key, C(public.pem) keeps the former one until the certificate for the new one is there.
  - A replaced certificate is verified as clients receive it; if that fails, the former one is restored.
  - The private key never leaves the host and appears in no output.
author: [llmkeep contributors (@llmkeep)]
options:
  names: {description: DNS names for the request., type: list, elements: str, required: true}
  chain: {description: "The certificate and its chain (PEM), without the root; empty without one.", type: str, default: ""}
  root: {description: The root of that chain (PEM)., type: str, default: ""}
  chain_names: {description: "DNS names that the certificate must have.", type: list, elements: str, default: []}
  retired: {description: SHA-256 of public keys that no request may have., type: list, elements: str, default: []}
  requested_key: {description: SHA-256 of the public key in the request that the control node has., type: str, default: ""}
  requested_names: {description: The names in that request., type: list, elements: str, default: []}
  directory: {description: Directory of the files., type: path, default: /etc/llmkeep/pki}
  public_key: {description: Public part (PEM) of a key that is in an HSM., type: str, default: ""}
  key: {description: File with the reference to a key in an HSM., type: path}
  openssl:
    description: The openssl command that signs the request; a key in an HSM needs the PIN.
    type: list
    elements: str
    default: [openssl]
  group: {description: The group that may read the key., type: str, default: ssl-cert}
  reload_unit:
    description: Unit that reloads the services that use the certificate.
    type: str
    default: llmkeep-certificate.service
  served: {description: Command that fails where the certificate is not served., type: list, elements: str, default: []}
"""

EXAMPLES = r"""
- name: Make the key and the request
  llmkeep.estate.public_certificate:
    names: [llm.example.org]
  register: certificate
"""

RETURN = r"""
installed: {description: Whether the certificate is in place., returned: always, type: bool}
request: {description: "The request (PEM), where the control node has none for this key and names.", returned: always, type: str}
days_left: {description: Days until the installed certificate expires; -1 without one., returned: always, type: int}
"""

import base64
import hashlib
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config.certificates import (
    days_left,
    key_in_place,
    openssl,
    reload_unit,
    request,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")
PRIVATE_KEY = re.compile(r"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----\n", re.DOTALL)
SERVED_SECONDS = 60


def digest(public_key: str) -> str:
    """SHA-256 of a public key (PEM), as the control node has it."""
    body = "".join(line for line in public_key.splitlines() if not line.startswith("-----"))
    return hashlib.sha256(base64.b64decode(body)).hexdigest()


def public_part(key: str) -> str:
    public: str = openssl("pkey", "-pubout", stdin=key)
    return public.strip()


def keys_here(params: dict[str, Any], key: Path, place: Path) -> dict[str, str]:
    """What has to follow the chain in the file, by public key: the private key, or nothing where it is in an HSM."""
    if params["public_key"]:
        return {params["public_key"].strip(): ""}
    keys = [key.read_text()] if key.exists() else []
    keys += PRIVATE_KEY.findall(place.read_text(errors="replace")) if place.exists() else []
    key_of = {}
    for each in keys:
        with suppress(Refused):  # a damaged file is replaced
            key_of[public_part(each)] = each
    return key_of


def verify(chain: Path, root: Path, names: list[str]) -> None:
    """Refused unless the first certificate in a file verifies up to the root for each of the names."""
    for name in names:
        try:
            openssl(
                "verify",
                "-purpose",
                "sslserver",
                "-CAfile",
                str(root),
                "-untrusted",
                str(chain),
                "-verify_hostname",
                name,
                str(chain),
            )
        except Refused as problem:
            raise Refused(
                f"the certificate for {name} is not taken, since it does not verify: {problem}. The one on disk stays."
                " Compare the clocks of this host and of the control node, or install another by `llmkeep pki install`"
            ) from None


def install(params: dict[str, Any], place: Path, root: Path, text: str, gid: int) -> None:
    """Put chain and key in place, have them served, and put the former ones back where they are not."""
    new = {root: (params["root"], 0, 0o444), place: (text, gid, 0o640)}
    former = {path: path.read_bytes() for path in new if path.exists()}
    aside = [
        atomic.write_beside(path, text.encode(), 0, gid, mode) for path, (text, gid, mode) in new.items()
    ]
    try:
        verify(aside[1], aside[0], params["chain_names"])
        for beside, path in zip(aside, new, strict=True):
            atomic.replace(beside, path)
    finally:
        for beside in aside:
            beside.unlink(missing_ok=True)
    if len(former) < len(new):
        return  # nothing serves it yet
    try:
        reload_unit(params["reload_unit"])
        done = subprocess.run(
            params["served"], capture_output=True, text=True, timeout=SERVED_SECONDS, check=False
        )
        if done.returncode != 0:
            raise Refused(done.stdout.strip() or done.stderr.strip())
    except Refused as problem:
        for path, (_, gid, mode) in new.items():
            atomic.write_file(path, former[path], 0, gid, mode)
        reload_unit(params["reload_unit"])
        raise Refused(
            f"the new certificate was not served ({problem}), so the former one is in place again:"
            " look at `journalctl -u nginx`, then run again"
        ) from None


def settle(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    folder = Path(params["directory"])
    key, place, root = folder / "public.key", folder / "public.pem", folder / "public-root.pem"
    if bad := [name for name in params["names"] + params["chain_names"] if not NAME.fullmatch(name)]:
        raise Refused(
            f"names has {bad}: give lower-case DNS names without wildcards; correct edge_public_names"
        )
    changed = False
    if params["public_key"]:
        if key.exists():
            changed = True
            if not check:
                atomic.remove(key)
    else:
        if key.exists() and digest(public_part(key.read_text())) in params["retired"]:
            changed = True
            if not check:
                atomic.remove(key)
        changed = key_in_place(key, params["group"], check) or changed
    keys = keys_here(params, key, place)
    installed = False
    if params["chain"]:
        leaf_key = openssl("x509", "-noout", "-pubkey", stdin=params["chain"]).strip()
        installed = leaf_key in keys
        if installed:
            gid = atomic.group_id(params["group"]) or 0
            text = params["chain"] + keys[leaf_key]
            if not is_in_place(place, text, gid, 0o640) or not is_in_place(root, params["root"], 0, 0o444):
                changed = True
                if not check:
                    install(params, place, root, text, gid)
    if check and not (params["public_key"] or key.exists()):
        return {"changed": True, "installed": installed, "request": "", "days_left": days_left(place)}
    own = params["public_key"].strip() or public_part(key.read_text())
    asked = digest(own) == params["requested_key"] and params["names"] == params["requested_names"]
    return {
        "changed": changed,
        "installed": installed,
        "request": "" if asked else request(Path(params["key"] or key), params["names"], params["openssl"]),
        "days_left": days_left(place) if installed else -1,
    }


def is_in_place(path: Path, text: str, gid: int, mode: int) -> bool:
    status = atomic.status_of(path)
    return (
        status is not None
        and (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, gid, mode)
        and path.read_bytes() == text.encode()
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "chain": {"type": "str", "default": ""},
            "root": {"type": "str", "default": ""},
            "chain_names": {"type": "list", "elements": "str", "default": []},
            "retired": {"type": "list", "elements": "str", "default": []},
            "requested_key": {"type": "str", "default": "", "no_log": False},
            "requested_names": {"type": "list", "elements": "str", "default": []},
            "directory": {"type": "path", "default": "/etc/llmkeep/pki"},
            "public_key": {"type": "str", "default": "", "no_log": False},
            "key": {"type": "path", "no_log": False},
            "openssl": {"type": "list", "elements": "str", "default": ["openssl"]},
            "group": {"type": "str", "default": "ssl-cert"},
            "reload_unit": {"type": "str", "default": "llmkeep-certificate.service"},
            "served": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**settle(module.params, module.check_mode))
    except Refused as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
