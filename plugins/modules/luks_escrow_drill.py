#!/usr/bin/python
"""A drill, on the control node: does what is kept of a volume really open it?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: luks_escrow_drill
short_description: Prove that a volume's escrowed recovery key opens its escrowed header
description:
  - Decrypts recovery key and header backup with the escrow key, restores the header to an empty file in memory, and
    opens it with the recovery key. The volume itself and its host are not touched.
  - Records the date in the register. The escrow key is read in place and never copied.
author: [llmkeep contributors (@llmkeep)]
options:
  folder: {description: Directory of the register., type: path, default: /var/lib/llmkeep/storage}
  volume: {description: "The volume, as HOST/NAME.", type: str, required: true}
  escrow_key: {description: "The escrow key (PEM), available for the duration of the drill.", type: path, required: true}
  escrow_passphrase_file: {description: "File with its passphrase, readable by root alone.", type: path}
"""

EXAMPLES = r"""
- name: Prove that the recovery key of a volume opens its header
  llmkeep.estate.luks_escrow_drill:
    volume: llm1/data
    escrow_key: /run/media/escrow.key
    escrow_passphrase_file: /run/escrow.passphrase
  delegate_to: ops1
"""

RETURN = r"""
drilled: {description: Time of the drill., returned: success, type: str}
slot: {description: Key slot that the recovery key opened., returned: success, type: int}
"""

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import luks


def passphrase_source(file: Path | None) -> list[str]:
    """The arguments that give openssl the escrow key's passphrase. Without a file it is empty, since openssl must not ask."""
    if file is None:
        return ["-passin", "pass:"]
    try:
        status = file.stat()
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}: write the escrow key's passphrase into it") from error
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise Refused(
            f"{file} has mode {status.st_mode & 0o7777:04o} and belongs to user {status.st_uid}: make it readable by root alone,"
            " and give the escrow key another passphrase if others could read it"
        )
    return ["-passin", f"file:{file}"]


def opened(path: Path, key: Path, passphrase_file: Path | None) -> bytes:
    """What a CMS file holds, by the escrow key."""
    if not path.exists():
        raise Refused(f"{path} does not exist: run site.yml for the volume's host, which stores it")
    argv = ["openssl", "cms", "-decrypt", "-inform", "PEM", "-binary", "-inkey", str(key), "-in", str(path)]
    argv += passphrase_source(passphrase_file)
    try:
        content: bytes = luks.must(argv, f"open {path}")
    except luks.Failed as problem:
        raise Refused(
            f"{problem}. Is {key} the escrow key of this estate, and is its passphrase correct? If so, the stored copy is "
            "useless: rotate the volume's recovery key (playbooks/rotate-keys.yml) at once"
        ) from problem
    return content


def drill(folder: Path, volume: str, key: Path, passphrase_file: Path | None = None) -> dict[str, Any]:
    """Restore on a copy and open it; what the register then says."""
    stem = volume.replace("/", "-")
    path = folder / f"{stem}.json"
    if not path.exists():
        known = sorted(path.stem for path in folder.glob("*.json"))
        raise Refused(
            f"the register has no volume {volume}; it has {', '.join(known) or 'none'}, as HOST-NAME"
        )
    entry: dict[str, Any] = json.loads(path.read_text())
    formats.require(path, entry, Refused)
    envelope = json.loads(opened(folder / f"{stem}.recovery.cms", key, passphrase_file))
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir="/run") as name:
        copy = Path(name, "copy")
        copy.write_bytes(opened(folder / f"{stem}.header.cms", key, passphrase_file))
        os.truncate(copy, luks.DATA_OFFSET * 512 + (1 << 20))
        header = luks.read(copy)
        if header is None or header.uuid != entry["uuid"] or envelope["uuid"] != entry["uuid"]:
            actual = header.uuid if header else "none"
            raise Refused(
                f"{volume} has the UUID {entry['uuid']}, its header backup {actual}, its recovery key {envelope['uuid']}: "
                "one of them is out of date. Run site.yml for the host, which stores both again"
            )
        slot = luks.opens(copy, envelope["recovery_key"].encode())
        if slot is None:
            raise Refused(
                f"the recovery key of {volume} does not open its header backup: rotate it (playbooks/rotate-keys.yml)"
            )
    return entry | {"drilled": datetime.now(UTC).isoformat(timespec="seconds"), "drilled_slot": slot}


def note(folder: Path, volume: str, entry: dict[str, Any]) -> None:
    path = folder / f"{volume.replace('/', '-')}.json"
    atomic.write_file(path, (json.dumps(entry, indent=1) + "\n").encode(), os.geteuid(), os.getegid(), 0o600)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "folder": {"type": "path", "default": "/var/lib/llmkeep/storage"},
            "volume": {"type": "str", "required": True},
            "escrow_key": {"type": "path", "required": True, "no_log": False},
            "escrow_passphrase_file": {"type": "path", "no_log": False},
        },
        supports_check_mode=True,
    )
    folder = Path(module.params["folder"])
    try:
        passphrase = module.params["escrow_passphrase_file"]
        entry = drill(
            folder,
            module.params["volume"],
            Path(module.params["escrow_key"]),
            Path(passphrase) if passphrase else None,
        )
    except (Refused, luks.Failed) as problem:
        module.fail_json(msg=str(problem))
    if not module.check_mode:
        note(folder, module.params["volume"], entry)
    module.exit_json(changed=True, drilled=entry["drilled"], slot=entry["drilled_slot"])


if __name__ == "__main__":
    main()
