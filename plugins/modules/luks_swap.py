#!/usr/bin/python
"""State module: a swap disk, encrypted with a random key that is never stored."""

from __future__ import annotations

DOCUMENTATION = r"""
module: luks_swap
short_description: Mark a blank disk as swap under a random key
description:
  - A mapping with a random key has no header, so nothing on the disk identifies it, and it is formatted at each boot.
    The disk is therefore marked once with a LUKS2 header without key slots, under the same rule as a volume's disk,
    of never formatting a disk that is not provably empty. Swap begins behind the header, and the boot finds the disk by its UUID.
  - Can be interrupted at any moment and run again. A case that needs a decision fails with C(needs_person).
author: [llmkeep contributors (@llmkeep)]
options:
  name: {description: Name of the swap., type: str, required: true}
  serial: {description: Serial of the disk; of an image file its name., type: str, required: true}
  device: {description: Path of the disk if its serial is not unique., type: str}
  size: {description: Minimum size of the disk in bytes., type: int, required: true}
  registered:
    description: The estate's volumes, each with C(uuid), C(serial) and C(volume). Their disks never count as blank.
    type: list
    elements: dict
    default: []
  destroy: {description: Serial of a disk whose contents may be destroyed; a disk in use is refused., type: str, default: ""}
  state_dir: {description: Directory of the record., type: path, default: /var/lib/llmkeep/luks}
"""

EXAMPLES = r"""
- name: Mark the disk of swap
  llmkeep.estate.luks_swap:
    name: swap
    serial: LLM1-SWAP-1
    size: 64000000
"""

RETURN = r"""
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
uuid: {description: UUID of the header; empty in check mode before it exists., returned: success, type: str}
offset: {description: Start of the swap in sectors of 512 bytes., returned: success, type: int}
needs_person: {description: Whether a person must decide; a second run fails in the same way., returned: failure, type: bool}
"""

import json
import os
import re
import secrets
import uuid
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import disks, luks
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.record import (
    NeedsPerson,
    Refused,
    read,
)


def save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic.write_file(path, json.dumps(record, indent=1).encode(), os.geteuid(), os.getegid(), 0o600)


def against(disk: Any, parameters: dict[str, Any], record: dict[str, Any] | None) -> list[Any]:
    """What speaks against marking the disk; of a mark that was begun, beside what it may have left."""
    if record is None or record["uuid"] not in str(list(disks.signatures(disk))):
        register = disks.from_register(parameters["registered"])
        findings: list[Any] = disks.against_formatting(
            disk, parameters["serial"], parameters["size"], register, parameters["destroy"]
        )
        return findings
    findings = [*disks.identity(disk, parameters["serial"], parameters["size"]), *disks.users(disk)]
    if not record["overridden"]:
        findings += [each for each in disks.signatures(disk) if record["uuid"] not in each.observation]
        findings += disks.reading(disk, start=luks.DATA_OFFSET * 512)
    return findings


def marked(disk: Any, record: dict[str, Any]) -> bool:
    header = luks.read(disk.path)
    return header is not None and header.uuid == record["uuid"] and not header.slots


def settle(parameters: dict[str, Any], check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    try:
        disk = disks.disk_of(parameters["serial"], parameters["device"])
    except disks.Unusable as problem:
        raise Refused(str(problem)) from None
    path = Path(parameters["state_dir"], f"{parameters['name']}.swap.json")
    record = read(path) if path.exists() else None
    if record and record["done"]:
        if wrong := list(disks.identity(disk, parameters["serial"], parameters["size"])):
            raise Refused("\n".join(map(str, wrong)))
        if marked(disk, record):
            if disk.block is not None and not check:
                luks.show(disk.path, record["uuid"])
            return {"changed": False, "changes": [], "uuid": record["uuid"], "offset": luks.DATA_OFFSET}
        raise NeedsPerson(
            f"{disk.path} was marked for the swap {parameters['name']}, UUID {record['uuid']}, but the mark is gone: the "
            f"disk has other content and is not used for swap. Name another disk, or remove {path} and run again, "
            "which marks it"
            " if it is blank"
        )
    wrong = against(disk, parameters, record)
    if wrong:
        raise Refused("\n".join(map(str, wrong)))
    changes = [f"mark {disk.path} for the swap {parameters['name']}"]
    if check:
        return {"changed": True, "changes": changes, "uuid": "", "offset": luks.DATA_OFFSET}
    overridden = bool(parameters["destroy"] and parameters["destroy"] == parameters["serial"])
    if record is None:
        record = {
            "format": formats.FORMAT,
            "serial": parameters["serial"],
            "uuid": str(uuid.uuid4()),
            "overridden": overridden,
            "done": False,
        }
    save(path, record | {"overridden": record["overridden"] or overridden})
    if overridden:
        luks.must(["wipefs", "--all", str(disk.path)], "take away what was on the disk")
    luks.format_device(
        disk.path, record["uuid"], f"llmkeep-{parameters['name']}", secrets.token_bytes(64)
    )  # a key that ends here
    luks.must(["cryptsetup", "erase", "--batch-mode", str(disk.path)], "take away its key slot")
    if disk.block is not None:
        luks.show(disk.path, record["uuid"])
    if not marked(disk, record):
        raise Refused(f"{disk.path} does not show the mark that was just written: see `dmesg` for the disk")
    save(path, record | {"done": True})
    return {"changed": True, "changes": changes, "uuid": record["uuid"], "offset": luks.DATA_OFFSET}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "serial": {"type": "str", "required": True},
            "device": {"type": "str"},
            "size": {"type": "int", "required": True},
            "registered": {"type": "list", "elements": "dict", "default": []},
            "destroy": {"type": "str", "default": ""},
            "state_dir": {"type": "path", "default": "/var/lib/llmkeep/luks"},
        },
        supports_check_mode=True,
    )
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,30}", module.params["name"]):
        module.fail_json(
            msg=f"{module.params['name']!r} is not a valid swap name: use lowercase letters, digits and underscores",
            needs_person=False,
        )
    try:
        module.exit_json(**settle(module.params, module.check_mode))
    except NeedsPerson as problem:
        module.fail_json(msg=str(problem), needs_person=True)
    except (Refused, luks.Failed) as problem:
        module.fail_json(msg=str(problem), needs_person=False)


if __name__ == "__main__":
    main()
