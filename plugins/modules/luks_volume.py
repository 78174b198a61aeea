#!/usr/bin/python
"""State module: an encrypted volume that opens with the HSM, from a blank disk to its file system."""

from __future__ import annotations

DOCUMENTATION = r"""
module: luks_volume
short_description: Manage an encrypted volume that is opened by a key in an HSM
description:
  - Formats a disk as LUKS2 only if every check finds it blank, enrols the HSM's key, a spare HSM's key and a recovery
    key, proves that each opens the volume, and wipes the bootstrap key.
  - Recovery key and header backup leave the host encrypted to the escrow key, as C(recovery_cms) and C(header_cms). The
    caller stores them and confirms by I(stored). Only then is the bootstrap key wiped. A new volume therefore takes
    two calls; a third one, after the final header's backup was stored, changes nothing.
  - Can be interrupted at any moment and run again. A case that needs a decision fails with C(needs_person).
  - The mount point is created, and is immutable while nothing is mounted. A mount point that already contains files,
    which a mount would hide, is refused before the disk is inspected.
  - On an image file, no file system is made, since nothing is activated.
author: [llmkeep contributors (@llmkeep)]
options:
  name: {description: Name of the volume., type: str, required: true}
  known_as: {description: The volume's name in the register; I(name) if empty., type: str, default: ""}
  serial: {description: Serial of the disk; of an image file its name., type: str, required: true}
  device: {description: Path of the disk if its serial is not unique., type: str}
  size: {description: Minimum size of the disk in bytes., type: int, required: true}
  filesystem: {description: File system., type: str, default: ext4, choices: [ext4, xfs]}
  mount: {description: Mount point., type: path}
  token: {description: PKCS#11 URI of the public key in the HSM., type: str, required: true}
  spare: {description: PKCS#11 URI of the public key in the spare HSM; empty for none., type: str, default: ""}
  pin_credential:
    description: Sealed credential with the PIN; the name of the file is the name of the credential.
    type: path
    default: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
  boot_credential:
    description: >-
      Sealed credential with the same PIN for the boot. systemd-cryptsetup 257 first reads C(cryptsetup.luks2-pin); if it is
      missing, it prompts on the console, up to C(timeout=), before it reads C(cryptsetup.pkcs11-pin).
    type: path
    default: /etc/credstore.encrypted/cryptsetup.luks2-pin
  escrow_certificate: {description: Certificate (PEM) of the escrow key., type: str, required: true}
  registered:
    description: The estate's volumes, each with C(uuid), C(serial) and C(volume). Their disks never count as blank.
    type: list
    elements: dict
    default: []
  stored:
    description: SHA-256 of C(recovery) and C(header) as the control node stores them.
    type: dict
    default: {}
  rotate:
    description: "Owners whose key is to be replaced: C(hsm), C(spare), C(recovery)."
    type: list
    elements: str
    default: []
  destroy:
    description: Serial of a disk whose contents may be destroyed. An intact volume and a disk in use are refused all the same.
    type: str
    default: ""
  hsm_seconds: {description: Time limit for each step with the HSM., type: int, default: 45}
  state_dir: {description: Directory of the volumes' records., type: path, default: /var/lib/llmkeep/luks}
"""

EXAMPLES = r"""
- name: Keep the volume of models
  llmkeep.estate.luks_volume:
    name: data
    serial: LLM1-DATA-1
    size: 4000000000
    token: pkcs11:token=llmkeep;object=llm1;type=public
    escrow_certificate: "{{ lookup('ansible.builtin.file', '/etc/llmkeep/pki/escrow.pem') }}"
    stored: {recovery: "{{ recovery.stat.checksum }}", header: "{{ header.stat.checksum }}"}
"""

RETURN = r"""
changes: {description: "Changes that were or would be made, one line each.", returned: always, type: list, elements: str}
state: {description: Phase of the volume; C(done) at the end., returned: always, type: str}
pending: {description: Whether another call is needed once the returned keys are stored., returned: always, type: bool}
device: {description: Path of the disk., returned: always, type: str}
uuid: {description: UUID of the volume., returned: always, type: str}
cipher: {description: Cipher of the data., returned: always, type: str}
key_bits: {description: Bits of the volume key., returned: always, type: int}
sector: {description: Sector size of the encryption., returned: always, type: int}
slots: {description: Each key slot with owner and enrolment., returned: always, type: list, elements: dict}
recovery_cms: {description: "Recovery key to store (CMS, PEM); empty if stored.", returned: always, type: str}
header_cms: {description: "Header backup to store (CMS, PEM); empty if stored.", returned: always, type: str}
needs_person: {description: Whether a person must decide; a second run fails in the same way., returned: failure, type: bool}
"""

import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import (
    disks,
    luks,
    mount_points,
    phases,
    volume,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.record import (
    DONE,
    HSM,
    SPARE,
    NeedsPerson,
    Refused,
)


def outcome(target: volume.Volume) -> dict[str, Any]:
    """What the module returns of a volume."""
    header = luks.read(target.path)
    record = target.record
    ours = header is not None and record is not None and header.uuid == record.uuid
    slots = target.inventory(header) if ours else []
    key_bits = {content["key_size"] * 8 for content in header.slots.values()} if ours else {0}
    return {
        "changed": bool(target.changes),
        "changes": target.changes,
        "state": record.phase if record else "absent",
        "pending": record is not None and record.phase != DONE,
        "device": str(target.path),
        "uuid": record.uuid if record else "",
        "cipher": header.segment.get("encryption", "") if ours else "",
        "key_bits": min(key_bits),
        "sector": header.segment.get("sector_size", 0) if ours else 0,
        "slots": slots,
        "recovery_cms": target.cms("recovery", record.recovery_sha256) if record else "",
        "header_cms": target.cms("header", record.header_sha256) if record else "",
        "diff": {"before": "", "after": "".join(f"{line}\n" for line in target.changes)},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "known_as": {"type": "str", "default": ""},
            "serial": {"type": "str", "required": True},
            "device": {"type": "str"},
            "size": {"type": "int", "required": True},
            "filesystem": {"type": "str", "default": "ext4", "choices": ["ext4", "xfs"]},
            "mount": {"type": "path"},
            "token": {"type": "str", "required": True, "no_log": False},
            "spare": {"type": "str", "default": ""},
            "pin_credential": {"type": "path", "default": "/etc/credstore.encrypted/cryptsetup.pkcs11-pin"},
            "boot_credential": {"type": "path", "default": "/etc/credstore.encrypted/cryptsetup.luks2-pin"},
            "escrow_certificate": {"type": "str", "required": True},
            "registered": {"type": "list", "elements": "dict", "default": []},
            "stored": {"type": "dict", "default": {}},
            "rotate": {"type": "list", "elements": "str", "default": []},
            "destroy": {"type": "str", "default": ""},
            "hsm_seconds": {"type": "int", "default": 45},
            "state_dir": {"type": "path", "default": "/var/lib/llmkeep/luks"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    uris = {owner: parameters[key] for owner, key in ((HSM, "token"), (SPARE, "spare")) if parameters[key]}
    for uri in uris.values():
        if not {"token", "object"} <= set(luks.attributes(uri)) or "pin-" in uri:
            module.fail_json(msg=f"{uri!r} has to name token and object, and never a PIN", needs_person=False)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,30}", parameters["name"]):
        module.fail_json(
            msg=f"{parameters['name']!r} is not a valid volume name: use lowercase letters, digits and underscores",
            needs_person=False,
        )
    try:
        bare = []
        if parameters["mount"]:
            mount_points.alone()
            bare = mount_points.settle(Path(parameters["mount"]), module.check_mode)
        target = volume.Volume(
            name=parameters["name"],
            serial=parameters["serial"],
            size=parameters["size"],
            tokens=uris,
            pin_credential=Path(parameters["pin_credential"]),
            escrow=parameters["escrow_certificate"],
            state_dir=Path(parameters["state_dir"]),
            device=parameters["device"],
            boot_credential=Path(parameters["boot_credential"]),
            filesystem=parameters["filesystem"],
            registered=disks.from_register(parameters["registered"]),
            known_as=parameters["known_as"] or parameters["name"],
            stored=parameters["stored"],
            rotate=parameters["rotate"],
            destroy=parameters["destroy"],
            hsm_seconds=parameters["hsm_seconds"],
            changes=bare,
        )
        if module.check_mode:
            phases.converge(target, check=True)
        else:
            with target.alone():
                phases.converge(target)
                if target.record is not None and target.disk.block is not None:
                    luks.show(target.path, target.record.uuid)
        module.exit_json(**outcome(target))
    except NeedsPerson as problem:
        module.fail_json(msg=str(problem), needs_person=True)
    except (Refused, mount_points.Refused, luks.Failed, pins.Fault) as problem:
        module.fail_json(msg=str(problem), needs_person=False)


if __name__ == "__main__":
    main()
