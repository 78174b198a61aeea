"""A host's record of an encrypted volume, and the errors of its phases."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

PLANNED, KEYS, ESCROW, WIPING, FILESYSTEM, DONE = "planned", "keys", "escrow", "wiping", "filesystem", "done"
HSM, SPARE, RECOVERY, BOOTSTRAP = "hsm", "spare", "recovery", "bootstrap"
ESCROWED = "escrow"  # to be rotated: what is encrypted to another escrow key than today's
PKCS11, RECOVERY_TOKEN = "systemd-pkcs11", "systemd-recovery"
# verity: weights on it can have the kernel check each read. Debian 13's XFS has nothing like it.
MKFS = {"ext4": ["mkfs.ext4", "-q", "-F", "-O", "verity"], "xfs": ["mkfs.xfs", "-q", "-f"]}


class NeedsPerson(Refused):  # type: ignore[misc]
    """Disk and record contradict each other, and a person must decide which is right."""

    def __init__(self, words: str) -> None:
        super().__init__(f"needs a person: {words}")


def read(path: Path) -> dict[str, Any]:
    """The document of a volume, a swap or an erasure in PATH; Refused where it has a newer format."""
    document: dict[str, Any] = json.loads(path.read_text())
    formats.require(path, document, Refused)
    return document


@dataclass
class Record:
    """The recorded state. `slots`: proven slots, each with owner, time of enrolment, and URI of the HSM key.

    `retiring`: slots that are about to be wiped.
    """

    name: str
    serial: str
    uuid: str
    phase: str = PLANNED
    slots: dict[str, dict[str, str]] = field(default_factory=dict)
    retiring: list[int] = field(default_factory=list)
    filesystem_made: bool = False
    overridden: bool = False  # what the disk held was allowed to go
    keys: list[str] = field(default_factory=list)  # URIs of all HSM keys it was ever enrolled with
    escrow_sha256: str = ""  # of the certificate that the recovery key was encrypted to
    recovery_sha256: str = ""
    header_sha256: str = ""
    format: int = formats.FORMAT

    def owned_by(self, owner: str) -> list[int]:
        return [int(slot) for slot, entry in self.slots.items() if entry["owner"] == owner]
