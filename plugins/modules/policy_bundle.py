#!/usr/bin/python
"""State module: the estate's policy on a host that judges by it, verified there and never older than it was."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_bundle
short_description: Install the control node's signed policy bundle after verifying it on this host
description:
  - Verifies signature, every file's hash, and expiry. Refuses a lower revision than was installed before, and
    another policy under the same revision. A refused bundle leaves the installed policy in place.
  - Key and bundle are replaced atomically. Policy engines detect the new bundle by themselves.
  - The result becomes the fact C(llmkeep_policy), so that a run fetches the policy from the control node once.
author: [llmkeep contributors (@llmkeep)]
options:
  key: {description: "The policy key, public half, PEM.", type: str, required: true}
  bundle: {description: "The bundle, in base64.", type: str, required: true}
  key_path: {description: Path of the installed key., type: path, default: /etc/llmkeep/policy/policy.pem}
  path: {description: Path of the installed bundle., type: path, default: /var/lib/llmkeep/policy/bundle.tar.gz}
  seen: {description: File with the highest revision installed here., type: path, default: /var/lib/llmkeep/policy/revision}
"""

EXAMPLES = r"""
- name: Put the policy in place
  llmkeep.estate.policy_bundle:
    key: "{{ policy_key }}"
    bundle: "{{ policy_bundle }}"
"""

RETURN = r"""
ansible_facts: {description: "C(llmkeep_policy): revision, expires, sha256, key.", returned: always, type: dict}
"""

import base64
import hashlib
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import policy
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic


def judged(new: policy.Policy, highest: int, present: bytes, key: str, now: datetime) -> None:
    """Refuse what is expired, older than HIGHEST, or another policy under the revision of the one that is PRESENT."""
    if now >= new.expires:
        raise policy.Refused(
            f"policy revision {new.revision} expired at {new.expires.isoformat()} and this host's clock says"
            f" {now:%Y-%m-%dT%H:%M:%SZ}: set the clock, or run `llmkeep policy build` on the control node"
        )
    if new.revision < highest:
        raise policy.Refused(
            f"the control node's policy is revision {new.revision}, but this host has had {highest}: an old policy would "
            "restore revoked permissions. Run `llmkeep policy build` on the control node until it is newer; if the control "
            "node was reinstalled, remove /var/lib/llmkeep/policy/revision on this host"
        )
    try:
        old = policy.opened(present, key) if new.revision == highest else None
    except policy.Refused:
        return  # what is in place is not to be used anyway
    if old and old.revision == new.revision and old.files != new.files:
        raise policy.Refused(
            f"two policies call themselves revision {new.revision}, the control node's and the one in place here:"
            " records name policies by revision. Run `llmkeep policy build` on the control node"
        )


def wrong(path: Path, content: bytes) -> bool:
    """Is the file not this one, readable by all and writable by root?"""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    if not path.is_file() or path.is_symlink() or path.read_bytes() != content:
        return True
    return (status.st_mode & 0o7777, status.st_uid, status.st_gid) != (0o644, *owner())


def owner() -> tuple[int, int]:
    """Whom the files belong to: who runs this, which is root."""
    return os.geteuid(), os.getegid()


def place(files: dict[Path, bytes]) -> None:
    """Write the files one after the other, the bundle last: it is what others watch."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        atomic.write_file(path, content, *owner(), 0o644)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "key": {"type": "str", "required": True, "no_log": False},
            "bundle": {"type": "str", "required": True},
            "key_path": {"type": "path", "default": "/etc/llmkeep/policy/policy.pem", "no_log": False},
            "path": {"type": "path", "default": "/var/lib/llmkeep/policy/bundle.tar.gz"},
            "seen": {"type": "path", "default": "/var/lib/llmkeep/policy/revision"},
        },
        supports_check_mode=True,
    )
    if module.check_mode and shutil.which("openssl") is None:
        module.warn(
            "the policy was not verified here, since openssl would be installed before; the control node has verified it"
        )
        module.exit_json(changed=True, ansible_facts={"llmkeep_policy": {"key": module.params["key"]}})
    key, content = module.params["key"], base64.b64decode(module.params["bundle"])
    path, remembered = Path(module.params["path"]), Path(module.params["seen"])
    try:
        new = policy.opened(content, key)
        highest = int(remembered.read_text()) if remembered.exists() else 0
        judged(new, highest, path.read_bytes() if path.is_file() else b"", key, datetime.now(UTC))
    except (policy.Refused, ValueError) as problem:
        module.fail_json(msg=f"{problem}. Nothing was changed on this host.")
    files = {
        Path(module.params["key_path"]): key.encode(),
        remembered: f"{new.revision}\n".encode(),
        path: content,
    }
    changed = {file: data for file, data in files.items() if wrong(file, data)}
    if not module.check_mode:
        place(changed)
    fact = {
        "revision": new.revision,
        "expires": new.expires.isoformat(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "key": key,
    }
    module.exit_json(
        changed=bool(changed),
        diff={"before": f"policy revision {highest}\n", "after": f"policy revision {new.revision}\n"},
        ansible_facts={"llmkeep_policy": fact},
    )


if __name__ == "__main__":
    main()
