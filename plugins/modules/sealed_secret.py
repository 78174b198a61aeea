#!/usr/bin/python
"""State module: a random secret, made and sealed on a host, that leaves it only encrypted to another host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: sealed_secret
short_description: Generate a random secret on the host and seal it as a systemd credential
description:
  - Generates random bytes, encodes them as hexadecimal text, and seals them with C(systemd-creds) in
    C(/etc/credstore.encrypted/NAME). Units load it by C(LoadCredentialEncrypted=).
  - The secret passes between processes through pipes only. Its SHA-256 is returned.
  - A credential that cannot be unsealed is never replaced, since a service may depend on it.
  - A secret is shared with another host by two calls. I(for_certificate) returns it encrypted to that host's
    certificate (CMS, AES-256-GCM); I(from_cms) decrypts it there with the host's key and seals it.
    Nothing in between, Ansible included, can read it.
author: [llmkeep contributors (@llmkeep)]
options:
  name: {description: Name of the credential., type: str, required: true}
  bytes: {description: Random bytes (15 to 256)., type: int, default: 32}
  create:
    description: Whether a secret may be generated; disable it for a secret that comes from elsewhere, such as the PIN of an HSM.
    type: bool
    default: true
  ring:
    description: >-
      The secret is a ring of keys, each a line C(STATE KEY) whose state is C(current), C(next) or C(former). C(kept) makes the
      first key; C(added) adds a next one unless there is one; C(switched) makes the next one current, and the current one former
      in place of another. Each can be repeated.
    type: str
    choices: [kept, added, switched]
  units:
    description: >-
      Units that load the secret. A change leaves a marker for M(llmkeep.estate.release_rollout) and
      M(llmkeep.estate.systemd_units).
    type: list
    elements: str
    default: []
  store: {description: Folder of sealed credentials., type: path, default: /etc/credstore.encrypted}
  for_certificate:
    description: Certificate (PEM) of the host to encrypt the secret to; returned as C(cms).
    type: str
  from_cms:
    description: >-
      The value that I(for_certificate) returned on the other host. The secret in it is sealed here and replaces
      another one of the same name, since the host that generated it is authoritative.
    type: str
  key: {description: This host's key., type: path, default: /etc/llmkeep/pki/host.key}
  certificate: {description: This host's certificate., type: path, default: /etc/llmkeep/pki/host.pem}
"""

EXAMPLES = r"""
- name: Make the gateway's pepper
  llmkeep.estate.sealed_secret:
    name: llm-gateway.pepper
- name: Encrypt the PIN of the HSM to this host
  llmkeep.estate.sealed_secret:
    name: llmkeep.hsm-pin
    for_certificate: "{{ certificate.content | b64decode }}"
  delegate_to: ops1
  register: pin
- name: Seal it
  llmkeep.estate.sealed_secret:
    name: cryptsetup.pkcs11-pin
    from_cms: "{{ pin.cms }}"
"""

RETURN = r"""
sha256: {description: SHA-256 of the secret; zeros in check mode before it exists., returned: always, type: str}
cms: {description: The secret encrypted to I(for_certificate); empty without one., returned: always, type: str}
"""

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused


def opened(path: Path, name: str, way_out: str) -> bytes:
    """The secret in a sealed credential."""
    try:
        return bytes(sealing.unseal(name, path.read_bytes()))
    except sealing.Failed as problem:
        raise Refused(
            f"{path} does not open on this host: {problem}. If the host's key was lost, remove the file and"
            f" run again: {way_out}"
        ) from problem


def store(path: Path, name: str, secret: bytes, units: list[str]) -> None:
    """Seal and store a secret, which the units have to load."""
    sealed = sealing.seal(name, secret)
    atomic.mark_pending(units)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    atomic.write_file(path, sealed, os.geteuid(), os.getegid(), 0o600)


def handed_over(cms: str, key: str, certificate: str) -> bytes:
    """The secret that another host encrypted to this one."""
    try:
        secret: bytes = sealing.piped(
            ["openssl", "cms", "-decrypt", "-binary", "-inform", "PEM", "-inkey", key, "-recip", certificate],
            cms.encode(),
            "the package openssl",
        )
    except sealing.Failed as problem:
        raise Refused(
            f"the encrypted secret cannot be decrypted with {key}: {problem}. It was encrypted to another certificate"
            f" than {certificate}; run the role again, which encrypts it to the present one"
        ) from problem
    return secret


def take_over(path: Path, name: str, secret: bytes, units: list[str], check: bool) -> bool:
    """Seal what was handed over where something else, or nothing, lies; whether it did."""
    if path.exists() and opened(path, name, "it is handed over again") == secret:
        return False
    if not check:
        store(path, name, secret, units)
    return True


def turned(ring: str, step: str, key: str) -> str:
    """The ring after a step of its rotation. `key`: for the one that the step adds."""
    keys = dict(line.split(" ") for line in ring.splitlines())
    if step == "added" and "next" not in keys:
        keys["next"] = key
    elif step == "switched" and "next" in keys:
        keys = {"current": keys["next"], "former": keys["current"]}
    return "".join(f"{state} {keys[state]}\n" for state in ("current", "next", "former") if state in keys)


@contextmanager
def alone(folder: Path, check: bool) -> Iterator[None]:
    """Hosts that are handed the same secret ask for it at once: only the first one makes it."""
    if check and not folder.is_dir():
        yield
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def settle(params: dict[str, Any], path: Path, check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    if params["from_cms"] is not None:
        secret = handed_over(params["from_cms"], params["key"], params["certificate"])
        changed = take_over(path, params["name"], secret, params["units"], check)
        return {"changed": changed, "sha256": hashlib.sha256(secret).hexdigest(), "cms": ""}
    with alone(path.parent, check):
        return own(params, path, check)


def own(params: dict[str, Any], path: Path, check: bool) -> dict[str, Any]:
    """Make the secret of this host, or take its ring a step further; what the module returns."""
    name, step, units = params["name"], params["ring"], params["units"]
    changed = not path.exists()
    if changed and not params["create"]:
        raise Refused(
            f"{path} does not exist, and this module does not create it: seal the secret yourself, by pipe and"
            f" without a newline: `systemd-ask-password -n SECRET | systemd-creds encrypt --name={name} - {path}`"
        )
    if changed and check:
        return {"changed": True, "sha256": "0" * 64, "cms": ""}
    new = secrets.token_hex(params["bytes"])
    if changed:
        store(path, name, (f"current {new}\n" if step else new).encode(), units)
    way_out = "a new secret is made, and everything that the old one protected must be issued again"
    secret = opened(path, name, way_out)
    if step and not changed:
        ring = turned(secret.decode(), step, new).encode()
        changed, secret = ring != secret, ring
        if changed and not check:
            store(path, name, ring, units)
    cms = sealing.encrypted_to(params["for_certificate"], secret) if params["for_certificate"] else ""
    return {"changed": changed, "sha256": hashlib.sha256(secret).hexdigest(), "cms": cms}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "bytes": {"type": "int", "default": 32},
            "create": {"type": "bool", "default": True},
            "ring": {"type": "str", "choices": ["kept", "added", "switched"]},
            "units": {"type": "list", "elements": "str", "default": []},
            "store": {"type": "path", "default": "/etc/credstore.encrypted"},
            "for_certificate": {"type": "str"},
            "from_cms": {"type": "str"},
            "key": {"type": "path", "default": "/etc/llmkeep/pki/host.key", "no_log": False},
            "certificate": {"type": "path", "default": "/etc/llmkeep/pki/host.pem"},
        },
        mutually_exclusive=[("for_certificate", "from_cms")],
        supports_check_mode=True,
    )
    name, size = module.params["name"], module.params["bytes"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name):
        module.fail_json(
            msg=f"{name!r} is not a valid credential name; use letters, digits, dot, dash and underscore"
        )
    if not 15 <= size <= 256:
        module.fail_json(msg=f"bytes is {size}; take 15 to 256")
    path = Path(module.params["store"]) / name
    try:
        module.exit_json(**settle(module.params, path, module.check_mode))
    except (Refused, sealing.Failed) as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
