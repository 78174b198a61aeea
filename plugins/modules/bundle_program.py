#!/usr/bin/python
"""State module: one program of the bundle on a host, in a folder named by what is in it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_program
short_description: Install a program of the bundle, verified against its signed manifest
description:
  - Fetches C(bin/NAME) from the mirror to C(ROOT/NAME/HASH/NAME), where HASH is the start of its sha256, and points
    the link C(ROOT/NAME/current) at that folder by one rename. The previous version is kept for a rollback.
  - Each run verifies the program's hash against the bundle's manifest, whose OpenPGP signature is verified on this host.
author: [llmkeep contributors (@llmkeep)]
options:
  url: {description: Base URL of the mirror., type: str, required: true}
  name: {description: Name of the program., type: str, required: true}
  root: {description: Folder of all programs., type: path, default: /opt/llmkeep/programs}
  units: {description: Units that run it., type: list, elements: str, default: []}
  ca: {description: The estate's root certificate., type: path, default: /etc/llmkeep/pki/root.pem}
  keyring: {description: Trusted keys., type: path, default: /etc/apt/keyrings/llmkeep.pgp}
"""

EXAMPLES = r"""
- name: Install OPA
  llmkeep.estate.bundle_program:
    url: "{{ mirror_url }}"
    name: opa
"""

RETURN = r"""
sha256: {description: SHA-256 of the program., returned: always, type: str}
"""

import os
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import mirror
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic

DIGITS = 12  # of the hash, in the folder's name


def is_there(path: Path, sha256: str) -> bool:
    """Is the program there, whole, and only root's to change?"""
    if path.is_symlink() or not path.is_file():
        return False
    status = path.stat()
    return (status.st_mode & 0o7777, status.st_uid) == (0o555, os.geteuid()) and atomic.sha256_of(
        path
    ) == sha256


def install(source: Any, entry: Any, path: Path) -> None:
    """Download it beside its destination, and rename it."""
    atomic.make_directories(path.parent, 0o755)
    beside = path.parent / f".{path.name}.new"
    source.fetch(entry, beside)
    atomic.set_attributes(beside, os.geteuid(), os.getegid(), 0o555)
    atomic.replace(beside, path)


def forget_old(folder: Path, keep: set[str]) -> None:
    """Remove the folders of programs that are neither current nor the one before."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name not in keep:
            shutil.rmtree(path)


def bring(source: Any, name: str, root: Path, units: list[str], check: bool) -> tuple[bool, str]:
    """The program in place and current: whether that took a change, and its hash."""
    matches = [
        entry for entry in mirror.entries(source.manifest("bundle"), "bin") if entry.path == f"bin/{name}"
    ]
    if not matches:
        raise mirror.MirrorError(
            f"the bundle has no bin/{name}; build it with LLMKEEP_MIRROR set to a folder that has it"
        )
    (entry,) = matches
    folder = root / name
    current, path = folder / "current", folder / entry.sha256[:DIGITS] / name
    before = str(current.readlink()) if current.is_symlink() else ""
    if is_there(path, entry.sha256) and before == path.parent.name:
        return False, entry.sha256
    if not check:
        install(source, entry, path)
        atomic.mark_pending(units)
        atomic.link(current, path.parent.name)
        forget_old(folder, {before, path.parent.name})
    return True, entry.sha256


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "name": {"type": "str", "required": True},
            "root": {"type": "path", "default": "/opt/llmkeep/programs"},
            "units": {"type": "list", "elements": "str", "default": []},
            "ca": {"type": "path", "default": "/etc/llmkeep/pki/root.pem"},
            "keyring": {"type": "path", "default": "/etc/apt/keyrings/llmkeep.pgp"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    if mirror.not_trusted_yet(module, parameters["ca"], parameters["keyring"]):
        module.exit_json(changed=True, sha256="")
    try:
        source = mirror.Mirror(parameters["url"], Path(parameters["ca"]), Path(parameters["keyring"]))
        changed, sha256 = bring(
            source, parameters["name"], Path(parameters["root"]), parameters["units"], module.check_mode
        )
    except (mirror.MirrorError, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=changed, sha256=sha256)


if __name__ == "__main__":
    main()
