#!/usr/bin/python
"""State module: a random secret that is made on the host, sealed there, and never leaves it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: sealed_secret
short_description: Keep a random secret as a systemd credential, made and sealed on the host
description:
  - Makes random bytes, writes them as hexadecimal text, and seals them with C(systemd-creds) to
    C(/etc/credstore.encrypted/NAME). Units take it by C(LoadCredentialEncrypted=).
  - The secret passes between processes by pipe only. What returns is its SHA-256.
  - A credential that cannot be opened is never replaced, since something may depend on it.
author: [llmkeep contributors]
options:
  name: {description: Name of the credential., type: str, required: true}
  bytes: {description: Random bytes (16 to 256)., type: int, default: 32}
  store: {description: Folder of sealed credentials., type: path, default: /etc/credstore.encrypted}
"""

EXAMPLES = r"""
- name: Make the gateway's pepper
  llmkeep.estate.sealed_secret:
    name: llm-gateway.pepper
"""

RETURN = r"""
sha256: {description: SHA-256 of the secret; zeros in check mode if not made., returned: always, type: str}
"""

import hashlib
import os
import re
import secrets
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils import files as atomic  # type: ignore[import-not-found]

SEAL_SECONDS = 60


class Refused(Exception):
    """The secret cannot be made or opened; the message says why and what to do."""


def systemd_creds(verb: str, name: str, given: bytes) -> bytes:
    """Seal or open over pipes."""
    argv = ["systemd-creds", verb, f"--name={name}", "-", "-"]
    try:
        done = subprocess.run(argv, input=given, capture_output=True, timeout=SEAL_SECONDS, check=False)
    except FileNotFoundError:
        raise Refused("systemd-creds is not on this host; systemd 250 or later brings it") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"systemd-creds {verb} did not end within {SEAL_SECONDS} s") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        raise Refused(f"systemd-creds {verb} ended with {done.returncode}: {words}")
    return done.stdout


def digest_of(path: Path, name: str) -> str:
    """SHA-256 of the secret in a sealed credential."""
    try:
        return hashlib.sha256(systemd_creds("decrypt", name, path.read_bytes())).hexdigest()
    except Refused as problem:
        raise Refused(
            f"{path} does not open on this host: {problem}. If the host's key was lost, remove the file and"
            " run again: a new secret is made, and what the old one protected has to be issued anew"
        ) from problem


def make(path: Path, name: str, size: int) -> str:
    """Make, seal and store a new secret; its SHA-256."""
    secret = secrets.token_hex(size).encode()
    sealed = systemd_creds("encrypt", name, secret)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    atomic.write_file(path, sealed, os.geteuid(), os.getegid(), 0o600)
    return hashlib.sha256(secret).hexdigest()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "bytes": {"type": "int", "default": 32},
            "store": {"type": "path", "default": "/etc/credstore.encrypted"},
        },
        supports_check_mode=True,
    )
    name, size = module.params["name"], module.params["bytes"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name):
        module.fail_json(
            msg=f"{name!r} is no name for a credential; use letters, digits, dot, dash and underscore"
        )
    if not 16 <= size <= 256:
        module.fail_json(msg=f"bytes is {size}; take 16 to 256")
    path = Path(module.params["store"]) / name
    try:
        if path.exists():
            module.exit_json(changed=False, sha256=digest_of(path, name))
        if module.check_mode:
            module.exit_json(changed=True, sha256="0" * 64)
        module.exit_json(changed=True, sha256=make(path, name, size))
    except Refused as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
