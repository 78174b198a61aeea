#!/usr/bin/python
"""State module, on the control node: what is kept of the estate's encrypted volumes away from their hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: luks_escrow
short_description: Store the volumes' recovery keys, header backups and register on the control node
description:
  - A volume has three files, C(HOST-NAME.json) in the register, C(HOST-NAME.recovery.cms) and C(HOST-NAME.header.cms);
    the last two are encrypted to the escrow key, whose private part is not in the estate.
  - Returns the register, and the SHA-256 of the stored files as they are read back.
author: [llmkeep contributors (@llmkeep)]
options:
  folder: {description: Directory of the files., type: path, default: /var/lib/llmkeep/storage}
  escrow: {description: Certificate of the escrow key., type: path, default: /srv/llmkeep/bundle/current/escrow.pem}
  volume: {description: "Volume to register, as HOST/NAME.", type: str}
  uuid: {description: Its UUID., type: str}
  serial: {description: Serial of its disk., type: str}
  recovery_cms: {description: Its recovery key (CMS); empty for no change., type: str, default: ""}
  header_cms: {description: Its header backup (CMS); empty for no change., type: str, default: ""}
  certificate:
    description: >-
      Certificate of its erasure. It is stored as C(erased/HOST-NAME.UUID.json), recovery key and header backup are
      overwritten and removed, and the volume is removed from the register.
    type: dict
"""

EXAMPLES = r"""
- name: Read the register
  llmkeep.estate.luks_escrow:
  delegate_to: ops1
- name: Store a recovery key
  llmkeep.estate.luks_escrow:
    volume: llm1/data
    uuid: 0b4e9d06-9a52-4a7e-b8b1-5d2a0b6a3c11
    serial: LLM1-DATA-1
    recovery_cms: "{{ made.recovery_cms }}"
  delegate_to: ops1
"""

RETURN = r"""
register: {description: "All volumes, each with C(uuid), C(serial) and C(volume).", returned: always, type: list, elements: dict}
stored:
  description: >-
    By volume, SHA-256 of C(recovery) and C(header), the times they were stored (C(recovery_stored), C(header_stored)), and
    the time of the last successful drill (C(drilled)). A key is missing where there was none.
  returned: always
  type: dict
erased: {description: "Certificates of erased volumes, C(HOST-NAME.UUID).", returned: always, type: list, elements: str}
escrow_certificate: {description: Certificate of the escrow key (PEM)., returned: always, type: str}
"""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

KINDS = ("recovery", "header")
DATES = ("recovery_stored", "header_stored", "drilled")


def stem(volume: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*/[a-z0-9][a-z0-9_]*", volume):
        raise Refused(f"{volume!r} is not a volume's name, which is HOST/NAME")
    return volume.replace("/", "-")


def entry_of(path: Path) -> dict[str, Any]:
    """The entry of a volume; Refused where it has a newer format."""
    entry: dict[str, Any] = json.loads(path.read_text())
    formats.require(path, entry, Refused)
    return entry


def register(folder: Path) -> list[dict[str, Any]]:
    """Every volume that was noted; Refused where an entry cannot be read, or has a newer format."""
    entries = []
    for path in sorted(folder.glob("*.json")):
        try:
            entry = entry_of(path)
            entries.append({name: str(entry[name]) for name in ("uuid", "serial", "volume")})
        except (ValueError, KeyError, TypeError) as problem:
            raise Refused(
                f"{path} is not an entry of the register ({problem}), without which no disk is judged: restore the file"
            ) from problem
    return entries


def stored(folder: Path, volume: str) -> dict[str, str]:
    paths = {kind: folder / f"{stem(volume)}.{kind}.cms" for kind in KINDS}
    return {kind: atomic.sha256_of(path) for kind, path in paths.items() if path.exists()}


def dates(folder: Path, volume: str) -> dict[str, str]:
    """When things were stored, and when they were last proven to open the volume."""
    entry = entry_of(folder / f"{stem(volume)}.json")
    return {name: str(entry[name]) for name in DATES if entry.get(name)}


def store(folder: Path, parameters: dict[str, Any], check: bool) -> list[str]:
    """Write what differs. Contents first, entry last: what the register names is there."""
    name = stem(parameters["volume"])
    changes = []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry_path = folder / f"{name}.json"
    entry = entry_of(entry_path) if entry_path.exists() else {"format": formats.FORMAT}
    for kind in KINDS:
        content = parameters[f"{kind}_cms"].encode()
        path = folder / f"{name}.{kind}.cms"
        if content and not (path.exists() and path.read_bytes() == content):
            changes.append(f"{kind} of {parameters['volume']}")
            entry[f"{kind}_stored"] = datetime.now(UTC).isoformat(timespec="seconds")
            if not check:
                atomic.write_file(path, content, os.geteuid(), os.getegid(), 0o400)
    document = entry | {
        "uuid": parameters["uuid"],
        "serial": parameters["serial"],
        "volume": parameters["volume"],
    }
    if not entry_path.exists() or document != json.loads(entry_path.read_text()):
        changes.append(f"entry of {parameters['volume']}")
        if not check:
            text = json.dumps(document, indent=1) + "\n"
            atomic.write_file(entry_path, text.encode(), os.geteuid(), os.getegid(), 0o600)
    return changes


def bury(folder: Path, parameters: dict[str, Any], check: bool) -> list[str]:
    """Keep the certificate, destroy what opened the volume."""
    name = stem(parameters["volume"])
    paths = [folder / f"{name}.{kind}" for kind in ("recovery.cms", "header.cms", "json")]
    certificate = folder / "erased" / f"{name}.{parameters['uuid']}.json"
    changes = [f"certificate of {parameters['volume']}"] if not certificate.exists() else []
    if paths[2].exists() and entry_of(paths[2])["uuid"] != parameters["uuid"]:
        raise Refused(
            f"the register has another UUID of {parameters['volume']} than {parameters['uuid']}: nothing was removed"
        )
    changes += [f"{path.name} destroyed" for path in paths if path.exists()]
    if check or not changes:
        return changes
    certificate.parent.mkdir(mode=0o700, exist_ok=True)
    destroyed = {path.name: atomic.sha256_of(path) for path in paths[:2] if path.exists()}
    if not certificate.exists():
        text = json.dumps(parameters["certificate"] | {"escrow_destroyed_sha256": destroyed}, indent=1) + "\n"
        atomic.write_file(certificate, text.encode(), os.geteuid(), os.getegid(), 0o400)
    for path in paths[:2]:
        if path.exists():
            atomic.set_attributes(path, os.geteuid(), os.getegid(), 0o600)
            with path.open("r+b") as stream:
                stream.write(os.urandom(path.stat().st_size))
                stream.flush()
                os.fsync(stream.fileno())
            path.unlink()
    paths[2].unlink(
        missing_ok=True
    )  # no secret, and a run that is cut short here has to find it whole or gone
    atomic.fsync_directory(folder)
    return changes


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "folder": {"type": "path", "default": "/var/lib/llmkeep/storage"},
            "escrow": {"type": "path", "default": "/srv/llmkeep/bundle/current/escrow.pem"},
            "volume": {"type": "str"},
            "uuid": {"type": "str"},
            "serial": {"type": "str"},
            "recovery_cms": {"type": "str", "default": ""},
            "header_cms": {"type": "str", "default": ""},
            "certificate": {"type": "dict"},
        },
        required_by={"volume": ["uuid", "serial"]},
        supports_check_mode=True,
    )
    folder, escrow = Path(module.params["folder"]), Path(module.params["escrow"])
    try:
        if folder.exists():
            register(folder)  # refused before anything is written
        act = bury if module.params["certificate"] else store
        changes = act(folder, module.params, module.check_mode) if module.params["volume"] else []
        known = register(folder) if folder.exists() else []
        module.exit_json(
            changed=bool(changes),
            changes=changes,
            register=known,
            erased=sorted(path.stem for path in folder.glob("erased/*.json")),
            stored={
                entry["volume"]: stored(folder, entry["volume"]) | dates(folder, entry["volume"])
                for entry in known
            },
            escrow_certificate=escrow.read_text(),
        )
    except FileNotFoundError as problem:
        module.fail_json(
            msg=f"{problem.filename} does not exist: this host is not a control node, run bootstrap from the medium"
        )
    except Refused as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
