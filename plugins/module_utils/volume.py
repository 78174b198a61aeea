"""An encrypted volume on its way from a blank disk to one that opens with the HSM, and nothing lost wherever it stops.

The record is the intent, on the host's own disk, written before each step that it speaks of:
planned → keys → escrow → wiping → filesystem → done.
Until `wiping` the bootstrap key, sealed to the host, opens the volume; from then on HSM and recovery key do, both proven.
A run that finds another phase than `done` goes on from there: slots that it cannot account for are wiped, since each
slot that counts is in the record, and the record is written only once the slot was proven to open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils import (  # type: ignore[import-not-found]
    disks,
    luks,
    pins,
    sealing,
    volume_keys,
)
from ansible_collections.llmkeep.estate.plugins.module_utils import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.volume_record import (  # type: ignore[import-not-found]
    BOOTSTRAP,
    DONE,
    ESCROW,
    ESCROWED,
    FILESYSTEM,
    HSM,
    KEYS,
    MKFS,
    PKCS11,
    PLANNED,
    RECOVERY,
    WIPING,
    NeedsPerson,
    Record,
    Refused,
)


@dataclass
class Volume:
    """What is wanted. `tokens`: owner to URI of its public key. `stored`: SHA-256 of what the control node keeps."""

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
        found = self.at("json")
        self.record = Record(**json.loads(found.read_text())) if found.exists() else None

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
        """Two runs at once would each wipe what the other one enrols."""
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.at("lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused(f"another run works on {self.name}: wait for it, run again") from None
            try:
                yield
            except luks.WrongPin:
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
        try:
            pins.refuse_again(self.pin_credential, sealed)
        except pins.Fault as fault:
            raise luks.WrongPin(str(fault)) from None
        pin: bytes = sealing.unseal(self.pin_credential.name, sealed)
        return pin

    def header(self) -> luks.Header:
        """This volume's header. Another one, or none, is for a person."""
        found = luks.read(self.path)
        if found is None:
            raise NeedsPerson(
                f"volume {self.name}, UUID {self.known.uuid}, was made on {self.path}, which has no LUKS2 header now."
                " Restore the header backup (docs/storage.md). If the volume may go, say so by `luks_destroy` with"
                f" the serial {self.serial}"
            )
        if found.uuid != self.known.uuid:
            raise NeedsPerson(
                f"{self.path} holds a LUKS volume with the UUID {found.uuid}, and {self.name} has {self.known.uuid}."
                " Were disks swapped, or was it formatted by somebody else? Compare with `lsblk --output"
                " NAME,SERIAL,UUID`"
            )
        return found

    def token_of(self, owner: str, header: luks.Header) -> int | None:
        """The header's token of an owner's recorded slot."""
        for slot in self.known.owned_by(owner):
            for token in header.tokens_of(slot):
                if slot in header.slots and slot not in self.known.retiring:
                    return int(token)
        return None

    def differences(self, header: luks.Header) -> tuple[list[str], list[int]]:
        """Of a finished volume: owners that lack a slot, and slots that nobody owns."""
        lacking = []
        for owner in (*self.tokens, RECOVERY):
            token = self.token_of(owner, header)
            if token is None:
                lacking.append(owner)
            elif owner in self.tokens:
                enrolled = luks.attributes(header.tokens[token]["pkcs11-uri"])
                if enrolled != luks.attributes(self.tokens[owner]):
                    lacking.append(owner)
        return lacking, [slot for slot in header.slots if str(slot) not in self.known.slots]

    # ------------------------------------------------------------ the way
    def converge(self, check: bool = False) -> None:
        """Go on to where the volume is done or waits for its escrow; in check mode, say what would be done."""
        wrong = list(disks.identity(self.disk, self.serial, self.size))
        if wrong and self.record is not None:
            raise Refused("\n".join(map(str, wrong)))
        if self.record is not None and self.destroy == self.serial:
            found = luks.read(self.path)
            if self.record.phase == PLANNED:
                self.record.overridden = True
            elif found is None or found.uuid != self.record.uuid:
                self.record = None  # its disk's contents may go; a volume that is whole is never meant
        if self.record is None and (
            wrong or not self.adopted(check)
        ):  # plan() says all that is wrong at once
            self.plan(check)
        if self.record is not None and self.record.phase == DONE:
            self.compare(check)
        self.pin_for_the_boot(check)
        if check:
            if self.record is not None and self.record.phase != DONE and not self.changes:
                self.changes.append(f"go on with {self.name} from phase {self.record.phase}")
            return
        if self.known.phase in (ESCROW, WIPING) and self.escrow_moved():
            self.retire(RECOVERY)  # to another certificate than a run that ended in the middle had
            self.save(KEYS)
        if self.known.phase == PLANNED:
            self.format()
        if self.known.phase == ESCROW and not self.escrowed():
            self.still_to_escrow()
        if self.known.phase == KEYS:
            self.keys()
        if self.known.phase == ESCROW and self.escrowed():
            self.save(WIPING)
        if self.known.phase == WIPING:
            self.wipe_others()
        if self.known.phase == FILESYSTEM:
            self.make_filesystem()
        if self.known.phase == DONE and self.escrowed():
            self.drop(
                "recovery.cms"
            )  # the control node has them: what stays here would have to be erased too
            self.drop("header.cms")

    def pin_for_the_boot(self, check: bool) -> None:
        """The same PIN under the name by which systemd-cryptsetup asks first; without it the boot waits for a person."""
        path = self.boot_credential
        if path is None or not self.pin_credential.exists():
            return
        with contextlib.suppress(OSError, luks.Failed):
            if sealing.unseal(path.name, path.read_bytes()) == self.pin:
                return
        self.changes.append(f"seal the PIN as {path.name}")
        if not check:
            sealed = sealing.seal(path.name, self.pin)
            atomic.write_file(path, sealed, os.geteuid(), os.getegid(), 0o600)

    def escrowed(self) -> bool:
        return (self.stored.get("recovery"), self.stored.get("header")) == (
            self.known.recovery_sha256,
            self.known.header_sha256,
        )

    def still_to_escrow(self) -> None:
        """What the control node has not got and this host has not either is made anew."""
        if self.at("recovery.cms").exists() and self.at("header.cms").exists():
            return
        if self.stored.get("recovery") != self.known.recovery_sha256:
            self.retire(RECOVERY)
        self.save(KEYS)

    def escrow_moved(self) -> bool:
        """Whether the recovery key that is enrolled was encrypted to another escrow key than today's."""
        return self.known.escrow_sha256 not in ("", volume_keys.certificate_sha256(self.escrow))

    def retire(self, owner: str) -> None:
        self.known.retiring = sorted({*self.known.retiring, *self.known.owned_by(owner)})

    def adopted(self, check: bool) -> bool:
        """A volume of ours whose host lost its record: known to the register, and opened by this host's own key."""
        ours = {
            known.uuid
            for known in self.registered
            if (known.serial, known.volume) == (self.serial, self.known_as)
        }
        # cryptsetup, only asked what a header holds, mends a damaged one: it is not let near what is not ours.
        header = luks.read(self.path) if ours else None
        if header is None or header.uuid not in ours:
            return False
        self.changes.append(f"take {self.name}, UUID {header.uuid}, over from the register")
        if check:
            return True
        for number, token in header.tokens.items():
            named = luks.attributes(token.get("pkcs11-uri", ""))
            if token["type"] == PKCS11 and named == luks.attributes(self.tokens[HSM]):
                luks.prove(self.path, number, self.pin, self.hsm_seconds)
                keys = [other["pkcs11-uri"] for other in header.tokens.values() if other["type"] == PKCS11]
                self.record = Record(
                    self.name, self.serial, header.uuid, KEYS, filesystem_made=True, keys=keys
                )
                for slot in header.slots_of(number):
                    self.own(slot, HSM)
                return True
        raise NeedsPerson(
            f"the register has {self.known_as} with the UUID {header.uuid} on this disk, and none of its slots is for"
            f" {self.tokens[HSM]}: open it by the recovery key (docs/storage.md)"
        )

    def plan(self, check: bool) -> None:
        against = disks.against_formatting(
            self.disk, self.serial, self.size, self.registered, destroy=self.destroy
        )
        if against:
            raise Refused(f"{self.path} is not formatted for {self.name}:\n" + "\n".join(map(str, against)))
        self.changes.append(f"format {self.path} ({self.serial}) for {self.name}")
        if check:
            return
        volume_keys.new_bootstrap_key(self)
        overridden = self.destroy == self.serial
        self.record = Record(self.name, self.serial, str(uuid.uuid4()), overridden=overridden)
        self.save(PLANNED)

    def compare(self, check: bool) -> None:
        """A finished volume with what is wanted."""
        header = self.header()
        lacking, unowned = self.differences(header)
        if unowned:
            raise NeedsPerson(
                f"{self.path} ({self.name}) has key slots that nobody is known to own: {unowned}. Find out who added"
                f" them; `systemd-cryptenroll --wipe-slot={unowned[0]} {self.path}` takes one away"
            )
        moved = [owner for owner in lacking if self.token_of(owner, header) is not None]
        if set(moved) - set(self.rotate):
            raise NeedsPerson(
                f"{self.name} is enrolled with another key of {', '.join(moved)} than is wanted now"
                f" ({', '.join(self.tokens[owner] for owner in moved)}): playbooks/rotate-keys.yml changes keys"
            )
        if RECOVERY not in lacking and self.stored.get("recovery") != self.known.recovery_sha256:
            kept = self.at("recovery.cms")
            if not kept.exists():
                lacking.append(RECOVERY)  # nobody has this key: it is of no use
        if not lacking and self.stored.get("header") != self.known.header_sha256:
            kept = self.at("header.cms")
            if not kept.exists():
                self.changes.append(f"back up the header of {self.name}")
                if not check:
                    self.export_header()
                    self.save()
        if self.escrow_moved():
            if ESCROWED not in self.rotate:
                raise NeedsPerson(
                    f"the recovery key of {self.name} is encrypted to another escrow key (certificate"
                    f" {self.known.escrow_sha256[:12]}) than is wanted now: playbooks/rotate-keys.yml with luks_rotate"
                    " [escrow] makes it anew, or take the old certificate back"
                )
            lacking.append(RECOVERY)
        renewed = sorted({*lacking, *self.rotate} - {ESCROWED})
        if renewed:
            self.changes.append(f"enrol {', '.join(renewed)} of {self.name} anew")
            if not check:
                slots = [slot for owner in renewed for slot in self.known.owned_by(owner)]
                self.known.retiring = [
                    slot for slot in slots if slot in header.slots
                ]  # a free number is given anew
                self.save(KEYS)

    # ------------------------------------------------------------ format
    def format(self) -> None:
        """Format, or format again after a run that ended in the middle: until `keys` no data can be there."""
        try:
            key = sealing.unseal(f"{self.name}.{BOOTSTRAP}", self.at(BOOTSTRAP).read_bytes())
        except (OSError, luks.Failed):
            key = volume_keys.new_bootstrap_key(self)  # nothing depends on the old one yet
        header = luks.read(self.path)
        if header is not None and header.uuid != self.known.uuid and not self.known.overridden:
            self.header()
        if header is None or header.uuid != self.known.uuid or luks.opens(self.path, key) is None:
            self.only_our_leftovers()
            luks.format_device(self.path, self.known.uuid, f"llmkeep-{self.name}", key)
        self.save(KEYS)

    def only_our_leftovers(self) -> None:
        """That nobody put something on the disk since it was found blank: it may hold what format was at, no more."""
        against = list(disks.users(self.disk))
        if not self.known.overridden:
            against += [found for found in disks.signatures(self.disk) if self.known.uuid not in found.seen]
            against += list(disks.reading(self.disk, start=luks.DATA_OFFSET * 512))
        if against:
            raise NeedsPerson(
                f"{self.name} was about to be formatted on {self.path}, which was blank then and is not now:\n"
                + "\n".join(map(str, against))
            )

    # ------------------------------------------------------------ keys
    def keys(self) -> None:
        # Before the header has them: who erases the volume destroys them all.
        self.known.keys += [uri for uri in self.tokens.values() if uri not in self.known.keys]
        self.save()
        key = volume_keys.bootstrap_key(self)
        volume_keys.wipe_orphans(self, key)
        for owner, uri in self.tokens.items():
            volume_keys.enrol(self, owner, uri, key)
        volume_keys.enrol_recovery(self, key)
        self.export_header()
        self.save(ESCROW)

    def own(self, slot: int, owner: str) -> None:
        """Record a slot that was proven to open; the owner's former one retires."""
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

    # ------------------------------------------------------------ the end
    def wipe_others(self) -> None:
        """Take away the bootstrap key and what retires, once HSM and recovery key are known to open."""
        header = self.header()
        for slot in self.known.retiring:
            self.known.slots.pop(str(slot), None)
        self.known.retiring = []
        token = self.token_of(HSM, header)
        lacking = [owner for owner in (*self.tokens, RECOVERY) if self.token_of(owner, header) is None]
        if token is None or lacking:
            raise NeedsPerson(
                f"{self.name} lacks slots of {', '.join(lacking)}: the bootstrap key is not wiped. Somebody changed the"
                f" header since: `systemd-cryptenroll {self.path}` shows it"
            )
        luks.prove(self.path, token, self.pin, self.hsm_seconds)
        volume_keys.wipe_but(self, set(map(int, self.known.slots)), header)
        self.drop(BOOTSTRAP)
        self.export_header()
        self.changes.append(f"wipe the bootstrap key of {self.name}")
        made = self.known.filesystem_made or self.disk.block is None  # an image file is not activated
        self.save(DONE if made else FILESYSTEM)

    def make_filesystem(self) -> None:
        """The only mkfs in a volume's life. Until it is done nothing mounts it, so there is no data."""
        mapping = f"llmkeep-new-{self.name}"
        if Path("/dev/mapper", mapping).exists():
            luks.close(mapping)
        token = self.token_of(HSM, self.header())
        argv = ["cryptsetup", "open", "--token-only", "--token-id", str(token), str(self.path), mapping]
        luks.must(argv, f"open {self.name}", self.pin)
        try:
            luks.must([*MKFS[self.filesystem], f"/dev/mapper/{mapping}"], "make the file system", seconds=600)
        finally:
            luks.close(mapping)
        self.known.filesystem_made = True
        self.changes.append(f"make {self.filesystem} on {self.name}")
        self.save(DONE)

    # ------------------------------------------------------------ what is told
    def inventory(self, header: luks.Header | None) -> list[dict[str, Any]]:
        """Each key slot with its owner."""
        if header is None or self.record is None:
            return []
        key_of_ours = self.record.phase in (KEYS, ESCROW, WIPING)
        found = []
        for slot, content in sorted(header.slots.items()):
            said = self.record.slots.get(
                str(slot), {"owner": BOOTSTRAP if key_of_ours else "nobody", "enrolled": ""}
            )
            tokens = [header.tokens[token] for token in header.tokens_of(slot)]
            found.append(
                {
                    "slot": slot,
                    **said,
                    "type": tokens[0]["type"] if tokens else "password",
                    "uri": tokens[0].get("pkcs11-uri", "") if tokens else "",
                    "kdf": content["kdf"]["type"],
                }
            )
        return found

    def cms(self, kind: str, sha256: str) -> str:
        """What the control node still has to store; '' where it has it."""
        path = self.at(f"{kind}.cms")
        if self.record is None or self.record.phase in (PLANNED, KEYS) or self.stored.get(kind) == sha256:
            return ""
        return path.read_text() if path.exists() else ""
