"""The phases from a blank disk to a volume that the HSM opens; an interruption in any phase loses nothing.

The record on the host's own disk states the intent and is written before each step:
planned → keys → escrow → wiping → filesystem → done.
Until `wiping` the bootstrap key, sealed to the host, opens the volume; from then on HSM and recovery key do, both proven.
A run continues from any phase before `done`. It wipes slots that are not in the record, since a slot is recorded only
once it was proven to open the volume.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import disks, keys, luks
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.record import (
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
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.volume import Volume


def converge(of: Volume, check: bool = False) -> None:
    """Advance the volume until it is done or waits for its escrow; in check mode, report the changes."""
    wrong = list(disks.identity(of.disk, of.serial, of.size))
    if wrong and of.record is not None:
        raise Refused("\n".join(map(str, wrong)))
    if of.record is not None and of.destroy == of.serial:
        header = luks.read(of.path)
        if of.record.phase == PLANNED:
            of.record.overridden = True
        elif header is None or header.uuid != of.record.uuid:
            of.record = None  # its disk's contents may go; a volume that is whole is never meant
    if of.record is None and (wrong or not adopted(of, check)):  # plan() says all that is wrong at once
        plan(of, check)
    if of.record is not None and of.record.phase == DONE:
        compare(of, check)
    pin_for_the_boot(of, check)
    if check:
        if of.record is not None and of.record.phase != DONE and not of.changes:
            of.changes.append(f"go on with {of.name} from phase {of.record.phase}")
        return
    if of.known.phase in (ESCROW, WIPING) and keys.escrow_moved(of):
        of.retire(RECOVERY)  # to another certificate than a run that ended in the middle had
        of.save(KEYS)
    if of.known.phase == PLANNED:
        format_disk(of)
    if of.known.phase == ESCROW and not of.escrowed():
        still_to_escrow(of)
    if of.known.phase == KEYS:
        enrol_keys(of)
    if of.known.phase == ESCROW and of.escrowed():
        of.save(WIPING)
    if of.known.phase == WIPING:
        wipe_others(of)
    if of.known.phase == FILESYSTEM:
        make_filesystem(of)
    if of.known.phase == DONE and of.escrowed():
        of.drop("recovery.cms")  # the control node has them: what stays here would have to be erased too
        of.drop("header.cms")


def pin_for_the_boot(of: Volume, check: bool) -> None:
    """Seal the PIN under the name that systemd-cryptsetup reads first; without it the boot prompts on the console."""
    path = of.boot_credential
    if path is None or not of.pin_credential.exists():
        return
    with contextlib.suppress(OSError, luks.Failed):
        if sealing.unseal(path.name, path.read_bytes()) == of.pin:
            return
    of.changes.append(f"seal the PIN as {path.name}")
    if not check:
        sealed = sealing.seal(path.name, of.pin)
        atomic.write_file(path, sealed, os.geteuid(), os.getegid(), 0o600)


def still_to_escrow(of: Volume) -> None:
    """Recreate escrow files that neither the control node nor this host has."""
    if of.at("recovery.cms").exists() and of.at("header.cms").exists():
        return
    if of.stored.get("recovery") != of.known.recovery_sha256:
        of.retire(RECOVERY)
    of.save(KEYS)


def adopted(of: Volume, check: bool) -> bool:
    """Adopt a registered volume whose host lost its record, if this host's own key opens it."""
    ours = {known.uuid for known in of.registered if (known.serial, known.volume) == (of.serial, of.known_as)}
    # cryptsetup, only asked what a header holds, mends a damaged one: it is not let near what is not ours.
    header = luks.read(of.path) if ours else None
    if header is None or header.uuid not in ours:
        return False
    of.changes.append(f"take {of.name}, UUID {header.uuid}, over from the register")
    if check:
        return True
    for number, token in header.tokens.items():
        named = luks.attributes(token.get("pkcs11-uri", ""))
        if token["type"] == PKCS11 and named == luks.attributes(of.tokens[HSM]):
            luks.prove(of.path, number, of.pin, of.hsm_seconds)
            uris = [other["pkcs11-uri"] for other in header.tokens.values() if other["type"] == PKCS11]
            of.record = Record(of.name, of.serial, header.uuid, KEYS, filesystem_made=True, keys=uris)
            for slot in header.slots_of(number):
                of.own(slot, HSM)
            return True
    raise NeedsPerson(
        f"the register has {of.known_as} with the UUID {header.uuid} on this disk, and none of its slots is for"
        f" {of.tokens[HSM]}: open it with the recovery key (docs/operate/storage.md)"
    )


def plan(of: Volume, check: bool) -> None:
    against = disks.against_formatting(of.disk, of.serial, of.size, of.registered, destroy=of.destroy)
    if against:
        raise Refused(f"{of.path} is not formatted for {of.name}:\n" + "\n".join(map(str, against)))
    of.changes.append(f"format {of.path} ({of.serial}) for {of.name}")
    if check:
        return
    keys.new_bootstrap_key(of)
    overridden = of.destroy == of.serial
    of.record = Record(of.name, of.serial, str(uuid.uuid4()), overridden=overridden)
    of.save(PLANNED)


def differences(of: Volume, header: luks.Header) -> tuple[list[str], list[int]]:
    """Owners without a slot, and slots without an owner, on a finished volume."""
    lacking = []
    for owner in (*of.tokens, RECOVERY):
        token = of.token_of(owner, header)
        if token is None:
            lacking.append(owner)
        elif owner in of.tokens:
            enrolled = luks.attributes(header.tokens[token]["pkcs11-uri"])
            if enrolled != luks.attributes(of.tokens[owner]):
                lacking.append(owner)
    return lacking, [slot for slot in header.slots if str(slot) not in of.known.slots]


def compare(of: Volume, check: bool) -> None:
    """Compare a finished volume with its declaration."""
    header = of.header()
    lacking, unowned = differences(of, header)
    if unowned:
        raise NeedsPerson(
            f"{of.path} ({of.name}) has key slots without a known owner: {unowned}. Find out who added"
            f" them; `systemd-cryptenroll --wipe-slot={unowned[0]} {of.path}` removes one"
        )
    moved = [owner for owner in lacking if of.token_of(owner, header) is not None]
    if set(moved) - set(of.rotate):
        raise NeedsPerson(
            f"{of.name} is enrolled with another key of {', '.join(moved)} than the present one"
            f" ({', '.join(of.tokens[owner] for owner in moved)}): playbooks/rotate-keys.yml changes keys"
        )
    if RECOVERY not in lacking and of.stored.get("recovery") != of.known.recovery_sha256:
        copy = of.at("recovery.cms")
        if not copy.exists():
            lacking.append(RECOVERY)  # no one holds this key any more, so it is of no use
    if not lacking and of.stored.get("header") != of.known.header_sha256:
        copy = of.at("header.cms")
        if not copy.exists():
            of.changes.append(f"back up the header of {of.name}")
            if not check:
                of.export_header()
                of.save()
    if keys.escrow_moved(of):
        if ESCROWED not in of.rotate:
            raise NeedsPerson(
                f"the recovery key of {of.name} is encrypted to another escrow key (certificate"
                f" {of.known.escrow_sha256[:12]}) than the present one: playbooks/rotate-keys.yml with luks_rotate [escrow] "
                "makes a new one, or restore the old certificate"
            )
        lacking.append(RECOVERY)
    renewed = sorted({*lacking, *of.rotate} - {ESCROWED})
    if renewed:
        of.changes.append(f"enrol {', '.join(renewed)} of {of.name} again")
        if not check:
            slots = [slot for owner in renewed for slot in of.known.owned_by(owner)]
            of.known.retiring = [slot for slot in slots if slot in header.slots]  # a free number is reused
            of.save(KEYS)


def format_disk(of: Volume) -> None:
    """Format the disk, again if a run was interrupted: before phase `keys` it cannot contain data."""
    try:
        key = sealing.unseal(f"{of.name}.{BOOTSTRAP}", of.at(BOOTSTRAP).read_bytes())
    except (OSError, luks.Failed):
        key = keys.new_bootstrap_key(of)  # nothing depends on the old one yet
    header = luks.read(of.path)
    if header is not None and header.uuid != of.known.uuid and not of.known.overridden:
        of.header()
    if header is None or header.uuid != of.known.uuid or luks.opens(of.path, key) is None:
        only_our_leftovers(of)
        luks.format_device(of.path, of.known.uuid, f"llmkeep-{of.name}", key)
    of.save(KEYS)


def only_our_leftovers(of: Volume) -> None:
    """Check that nothing was written to the disk since it was found blank, except by an interrupted format."""
    against = list(disks.users(of.disk))
    if not of.known.overridden:
        against += [
            finding for finding in disks.signatures(of.disk) if of.known.uuid not in finding.observation
        ]
        against += list(disks.reading(of.disk, start=luks.DATA_OFFSET * 512))
    if against:
        raise NeedsPerson(
            f"{of.name} was about to be formatted on {of.path}, which was blank then and is not now:\n"
            + "\n".join(map(str, against))
        )


def enrol_keys(of: Volume) -> None:
    # Before the header has them: who erases the volume destroys them all.
    of.known.keys += [uri for uri in of.tokens.values() if uri not in of.known.keys]
    of.save()
    key = keys.bootstrap_key(of)
    keys.wipe_orphans(of, key)
    for owner, uri in of.tokens.items():
        keys.enrol(of, owner, uri, key)
    keys.enrol_recovery(of, key)
    of.export_header()
    of.save(ESCROW)


def wipe_others(of: Volume) -> None:
    """Wipe the bootstrap key and retiring slots, once HSM and recovery key are proven."""
    header = of.header()
    for slot in of.known.retiring:
        of.known.slots.pop(str(slot), None)
    of.known.retiring = []
    token = of.token_of(HSM, header)
    lacking = [owner for owner in (*of.tokens, RECOVERY) if of.token_of(owner, header) is None]
    if token is None or lacking:
        raise NeedsPerson(
            f"{of.name} lacks slots of {', '.join(lacking)}: the bootstrap key is not wiped. The header was"
            f" changed since: `systemd-cryptenroll {of.path}` shows it"
        )
    luks.prove(of.path, token, of.pin, of.hsm_seconds)
    keys.wipe_but(of, set(map(int, of.known.slots)), header)
    of.drop(BOOTSTRAP)
    of.export_header()
    of.changes.append(f"wipe the bootstrap key of {of.name}")
    made = of.known.filesystem_made or of.disk.block is None  # an image file is not activated
    of.save(DONE if made else FILESYSTEM)


def make_filesystem(of: Volume) -> None:
    """Make the file system, once in a volume's life. Nothing mounts the volume before, so it contains no data."""
    mapping = f"llmkeep-new-{of.name}"
    if Path("/dev/mapper", mapping).exists():
        luks.close(mapping)
    token = of.token_of(HSM, of.header())
    argv = ["cryptsetup", "open", "--token-only", "--token-id", str(token), str(of.path), mapping]
    luks.must(argv, f"open {of.name}", of.pin)
    try:
        luks.must([*MKFS[of.filesystem], f"/dev/mapper/{mapping}"], "make the file system", seconds=600)
    finally:
        luks.close(mapping)
    of.known.filesystem_made = True
    of.changes.append(f"make {of.filesystem} on {of.name}")
    of.save(DONE)
