#!/usr/bin/python
"""State module: a crypto-erased volume, and a certificate of its erasure."""

from __future__ import annotations

DOCUMENTATION = r"""
module: luks_erase
short_description: Crypto-erase a volume once its keys in the HSM are destroyed, and write a certificate
description:
  - First proves that no token opens the current header, nor therefore a restored backup of it, and refuses while one still
    does. Then destroys all key slots, overwrites the header area, and verifies that the header is gone.
  - Check mode only returns the labels of all keys that ever opened the volume (I(labels)); all of them must be destroyed,
    since each opens the header of its time. Refuses if another volume of the host is enrolled with one of them.
  - The certificate is kept on the host as C(NAME.erased.json) and returned; a second run returns it and changes nothing.
  - The recovery key still opens a header backup; the caller destroys both.
author: [llmkeep contributors (@llmkeep)]
options:
  name: {description: Name of the volume., type: str, required: true}
  uuid: {description: The volume's UUID in the register; a disk with other contents is not touched., type: str, required: true}
  pin_credential:
    description: Sealed credential with the PIN.
    type: path
    default: /etc/credstore.encrypted/cryptsetup.pkcs11-pin
  hsm_seconds: {description: Time limit for each step with the HSM., type: int, default: 45}
  state_dir: {description: Directory of the volumes' records., type: path, default: /var/lib/llmkeep/luks}
  device: {description: Path of the disk if its serial is not unique., type: str}
"""

EXAMPLES = r"""
- name: Erase a volume
  llmkeep.estate.luks_erase:
    name: audit
    uuid: 0b4e9d06-9a52-4a7e-b8b1-5d2a0b6a3c11
"""

RETURN = r"""
certificate: {description: "What was erased, how, and when.", returned: success, type: dict}
labels: {description: Labels of all HSM keys that ever opened the volume., returned: success, type: list, elements: str}
"""

import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import disks, luks
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.record import (
    PKCS11,
    NeedsPerson,
    Refused,
    read,
)

AREA = luks.DATA_OFFSET * 512


def keep(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    atomic.write_file(path, text.encode(), os.geteuid(), os.getegid(), 0o600)


def opening(device: Path, pin: bytes, seconds: int) -> list[str]:
    """URIs of tokens that still open the header. A wrong PIN proves nothing, and is told."""
    uris = []
    header = luks.read(device)
    for number, token in (header.tokens if header else {}).items():
        if token["type"] == PKCS11 and header.slots_of(number):
            try:
                luks.prove(device, number, pin, seconds)
            except luks.Failed:
                continue
            uris.append(str(token["pkcs11-uri"]))
    return uris


def labels_of(uris: list[str]) -> set[str]:
    return {unquote(luks.attributes(uri)["object"]) for uri in uris if uri}


def others(state: Path, name: str) -> dict[str, set[str]]:
    """Labels that the host's other volumes are enrolled with now, by volume."""
    labels = {}
    for path in state.glob("*.json"):
        if (
            path.stem != name and "." not in path.stem
        ):  # with a dot: a certificate, or swap, which has no keys
            record = read(path)
            labels[path.stem] = labels_of([slot.get("uri", "") for slot in record["slots"].values()])
    return labels


def doomed(state: Path, name: str, uuid: str) -> tuple[dict[str, Any], set[str]]:
    """The record of a volume that may be erased, and the labels of all keys that ever opened it."""
    path = state / f"{name}.json"
    if not path.exists():
        raise Refused(f"this host has no record of a volume {name}: nothing was erased")
    record = read(path)
    if record["uuid"] != uuid:
        raise Refused(
            f"{name} has the UUID {record['uuid']}, and {uuid} is to be erased; nothing was. Take it from the register"
        )
    labels = labels_of(record["keys"])
    for other, enrolled in others(state, name).items():
        if shared := sorted(labels & enrolled):
            raise Refused(
                f"{other} is enrolled with {', '.join(shared)} too, and would be lost with {name}; nothing was erased. Set"
                " another hsm_key_label for the host, and run playbooks/rotate-keys.yml -e rotate_hsm_key=true first"
            )
    return record, labels


def overwrite(device: Path) -> None:
    """Random bytes, then zeros, over all that a header and its key slots may lie in."""
    descriptor = os.open(device, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        for content in (secrets.token_bytes(AREA), bytes(AREA)):
            written = 0
            while written < AREA:
                written += os.pwrite(descriptor, content[written:], written)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def erase(state: Path, name: str, uuid: str, device: str | None, pin: bytes, seconds: int) -> dict[str, Any]:
    """Erase, or go on erasing; the certificate."""
    record_path, certificate = state / f"{name}.json", state / f"{name}.erased.json"
    record, labels = doomed(state, name, uuid)
    disk = disks.disk_of(record["serial"], device)
    used = [*disks.users(disk)]
    if used:
        raise Refused(
            f"{name} is in use; nothing was erased:\n" + "\n".join(str(finding) for finding in used)
        )
    header = luks.read(disk.path)
    if header is not None and header.uuid != uuid:
        raise Refused(f"{disk.path} holds the UUID {header.uuid}, not {uuid}; nothing was erased")
    done = {
        "format": formats.FORMAT,
        "volume": name,
        "uuid": uuid,
        "serial": record["serial"],
        "device": str(disk.path),
        "size": disk.size,
        "slots": record["slots"],
        "hsm_keys_destroyed": sorted(labels),
    }
    if header is not None and header.slots:
        still = opening(disk.path, pin, seconds)
        if still:
            raise Refused(
                f"{', '.join(still)} still opens {name} and every backup of its header; nothing was erased."
                " Destroy that key in the HSM first (playbooks/erase.yml does)"
            )
        keep(record_path, record | {"phase": "erasing"})
        done["header_opened_by_no_token"] = True
        luks.must(["cryptsetup", "luksErase", "--batch-mode", str(disk.path)], "destroy all key slots")
    elif record["phase"] != "erasing":
        raise NeedsPerson(
            f"{disk.path} has no header of {name} any more, and no erasure was begun: find out what became of it"
        )
    else:
        done["header_opened_by_no_token"] = (
            True  # by the run that ended in the middle, before it began to erase
        )
    overwrite(disk.path)
    if luks.read(disk.path) is not None:
        raise Refused(f"{disk.path} still has a header after it was overwritten: see `dmesg` for the disk")
    done |= {
        "key_slots_destroyed": True,
        "header_area_overwritten_bytes": AREA,
        "erased": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    keep(certificate, done)
    for path in state.glob(f"{name}.*"):
        if path not in (certificate, state / f"{name}.lock"):
            path.unlink()
    atomic.fsync_directory(state)
    return done


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "uuid": {"type": "str", "required": True},
            "pin_credential": {"type": "path", "default": "/etc/credstore.encrypted/cryptsetup.pkcs11-pin"},
            "hsm_seconds": {"type": "int", "default": 45},
            "state_dir": {"type": "path", "default": "/var/lib/llmkeep/luks"},
            "device": {"type": "str"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    state = Path(parameters["state_dir"])
    certificate = state / f"{parameters['name']}.erased.json"
    try:
        if certificate.exists() and not (state / f"{parameters['name']}.json").exists():
            known = read(certificate)
            if known["uuid"] == parameters["uuid"]:
                module.exit_json(changed=False, certificate=known, labels=known["hsm_keys_destroyed"])
        if module.check_mode:
            labels = doomed(state, parameters["name"], parameters["uuid"])[1]
            module.exit_json(changed=True, certificate={}, labels=sorted(labels))
        with pins.shown(parameters["pin_credential"]) as pin:
            done = erase(
                state,
                parameters["name"],
                parameters["uuid"],
                parameters["device"],
                pin,
                parameters["hsm_seconds"],
            )
    except NeedsPerson as problem:
        module.fail_json(msg=str(problem), needs_person=True)
    except (Refused, luks.Failed, pins.Fault, disks.Unusable) as problem:
        module.fail_json(msg=str(problem), needs_person=False)
    except OSError as problem:
        module.fail_json(msg=f"{problem.filename}: {problem.strerror}", needs_person=False)
    module.exit_json(changed=True, certificate=done, labels=done["hsm_keys_destroyed"])


if __name__ == "__main__":
    main()
