"""An encrypted volume: its declaration, its disk, its record, and its inventory of key slots."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import disks, luks
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.record import (
    BOOTSTRAP,
    ESCROW,
    KEYS,
    PLANNED,
    WIPING,
    NeedsPerson,
    Record,
    Refused,
    read,
)


@dataclass
class Volume:
    """A volume as declared. `tokens`: owner to URI of its public key. `stored`: SHA-256 of the control node's copies."""

    name: str
    serial: str
    size: int
    tokens: Mapping[str, str]
    pin_credential: Path
    escrow: str
    state_dir: Path
    device: str | None = None
    boot_credential: Path | None = None
    filesystem: str = "ext4"
    registered: Sequence[disks.Registered] = ()
    known_as: str = ""  # host/name in the register
    stored: Mapping[str, str] = field(default_factory=dict)
    rotate: Sequence[str] = ()
    destroy: str = ""
    hsm_seconds: int = 45
    changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.disk = disks.disk_of(self.serial, self.device)
        except disks.Unusable as problem:
            raise Refused(str(problem)) from None
        self.path = self.disk.path
        file = self.at("json")
        self.record = Record(**read(file)) if file.exists() else None

    # ------------------------------------------------------------ files
    def at(self, kind: str) -> Path:
        return self.state_dir / f"{self.name}.{kind}"

    def keep(self, kind: str, content: bytes) -> None:
        atomic.write_file(self.at(kind), content, os.geteuid(), os.getegid(), 0o600)

    def drop(self, kind: str) -> None:
        self.at(kind).unlink(missing_ok=True)
        atomic.fsync_directory(self.state_dir)

    def save(self, phase: str | None = None) -> None:
        self.known.phase = phase or self.known.phase
        self.keep("json", json.dumps(asdict(self.known), indent=1).encode())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the volume's lock: concurrent runs would wipe each other's slots."""
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.at("lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused(f"another run works on {self.name}: wait for it, run again") from None
            try:
                yield
            except pins.Fault:
                pins.remember(self.pin_credential, self.pin_credential.read_bytes())
                raise

    # ------------------------------------------------------------ what is there
    @property
    def known(self) -> Record:
        if self.record is None:
            raise Refused(f"{self.name} has no record")
        return self.record

    @property
    def pin(self) -> bytes:
        sealed = self.pin_credential.read_bytes()
        pins.refuse_again(self.pin_credential, sealed)
        pin: bytes = sealing.unseal(self.pin_credential.name, sealed)
        return pin

    def header(self) -> luks.Header:
        """This volume's header; NeedsPerson if there is none or another volume's."""
        header = luks.read(self.path)
        if header is None:
            raise NeedsPerson(
                f"volume {self.name}, UUID {self.known.uuid}, was made on {self.path}, which has no LUKS2 header now."
                " Restore the header backup (docs/operate/storage.md). If the volume may be erased, set `luks_destroy` to "
                f"the serial {self.serial}"
            )
        if header.uuid != self.known.uuid:
            raise NeedsPerson(
                f"{self.path} holds a LUKS volume with the UUID {header.uuid}, and {self.name} has {self.known.uuid}."
                " Were disks swapped, or was it formatted elsewhere? Compare with `lsblk --output"
                " NAME,SERIAL,UUID`"
            )
        return header

    def token_of(self, owner: str, header: luks.Header) -> int | None:
        """The header's token of an owner's recorded slot."""
        for slot in self.known.owned_by(owner):
            for token in header.tokens_of(slot):
                if slot in header.slots and slot not in self.known.retiring:
                    return int(token)
        return None

    def escrowed(self) -> bool:
        return (self.stored.get("recovery"), self.stored.get("header")) == (
            self.known.recovery_sha256,
            self.known.header_sha256,
        )

    def retire(self, owner: str) -> None:
        self.known.retiring = sorted({*self.known.retiring, *self.known.owned_by(owner)})

    def own(self, slot: int, owner: str) -> None:
        """Record a proven slot; the owner's previous one retires."""
        self.known.retiring += [
            other
            for other in self.known.owned_by(owner)
            if other != slot and other not in self.known.retiring
        ]
        enrolled = datetime.now(UTC).isoformat(timespec="seconds")
        self.known.slots[str(slot)] = {
            "owner": owner,
            "enrolled": enrolled,
            "uri": self.tokens.get(owner, ""),
        }
        self.save()

    def export_header(self) -> None:
        sealed = luks.encrypt_to(self.escrow, luks.backup(self.path))
        self.keep("header.cms", sealed)
        self.known.header_sha256 = hashlib.sha256(sealed).hexdigest()

    # ------------------------------------------------------------ what is told
    def inventory(self, header: luks.Header | None) -> list[dict[str, Any]]:
        """Each key slot with its owner."""
        if header is None or self.record is None:
            return []
        key_of_ours = self.record.phase in (KEYS, ESCROW, WIPING)
        rows = []
        for slot, content in sorted(header.slots.items()):
            entry = self.record.slots.get(
                str(slot), {"owner": BOOTSTRAP if key_of_ours else "unknown", "enrolled": ""}
            )
            tokens = [header.tokens[token] for token in header.tokens_of(slot)]
            rows.append(
                {
                    "slot": slot,
                    **entry,
                    "type": tokens[0]["type"] if tokens else "password",
                    "uri": tokens[0].get("pkcs11-uri", "") if tokens else "",
                    "kdf": content["kdf"]["type"],
                }
            )
        return rows

    def cms(self, kind: str, sha256: str) -> str:
        """Escrow file (CMS) that the control node has not stored yet; '' if it has."""
        path = self.at(f"{kind}.cms")
        if self.record is None or self.record.phase in (PLANNED, KEYS) or self.stored.get(kind) == sha256:
            return ""
        return path.read_text() if path.exists() else ""
