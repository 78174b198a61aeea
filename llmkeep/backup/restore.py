"""Restore a backup onto new hardware, on which only `bootstrap --restore` has been run.

A restore brings back everything that the estate trusts, so no other host changes. An interrupted restore can be continued.
"""

import json
from collections.abc import Callable
from pathlib import Path

from llmkeep import escrow
from llmkeep.backup import contents
from llmkeep.backup.contents import Description
from llmkeep.backup.repository import BackupError, Repository
from llmkeep.bundle import signing
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError
from llmkeep.escrow import EscrowError
from llmkeep.pki.authority import issuing_pair
from llmkeep.places import Places
from llmkeep.policy.bundle import signing_key
from llmkeep.record import runs
from llmkeep.sealing import in_memory

# What was signed between the backup and the loss has numbers that hosts have seen: new ones begin above them.
GAP = 1000


def restore(
    places: Places, repository: Repository, key: Path, passphrase_file: Path | None, snapshot: str
) -> str:
    """Restore a snapshot ("latest": the newest) with the escrow key; returns a message for the operator.

    Raises BackupError. An unsuitable backup is refused before anything changes.
    """
    with escrow.held(key, passphrase_file) as decrypt:
        password = _password(repository, key, decrypt)
        identity, facts = _choice(places, repository, password, snapshot)
        # Whatever is wrong with the key or the copy shows before the first file is here.
        with in_memory(
            repository.restic(password, "dump", identity, within(places, places.backup_secrets)).encode()
        ) as file:
            secrets = decrypt(file)
    write(places.restoring, json.dumps({"snapshot": identity}).encode() + b"\n", 0o600)
    # This machine's own serial stays: no older bundle is accepted here than it has seen.
    without = ["--exclude", within(places, places.bundle_serial)]
    repository.restic(password, "restore", identity, "--target", str(places.root), *without)
    names = contents.seal_secrets(places, secrets)
    _skip_numbers(places)
    try:
        issuing_pair(places)
        signing_key(places)
        runs.append(
            {
                "event.kind": "event",
                "event.category": ["configuration"],
                "event.type": ["change"],
                "event.action": "restore backup",
                "event.outcome": "success",
                "user.name": runs.who(),
                "llmkeep.backup.snapshot": identity,
                "llmkeep.backup.created": facts.created,
            }
        )
    except LlmkeepError as error:
        raise BackupError(
            f"the snapshot {identity[:8]} of {facts.created} is incomplete after the restore: {error}. Try an older one on "
            "a blank machine"
        ) from error
    places.restoring.unlink()
    return _message(facts, identity, names)


def _password(repository: Repository, key: Path, decrypt: Callable[[Path], bytes]) -> bytes:
    with in_memory(repository.encrypted_password()) as file:
        try:
            return decrypt(file)
        except EscrowError as error:
            raise BackupError(
                f"{key} does not open the backup at {repository.location}, which is encrypted to another escrow key: use "
                "the escrow key of its estate"
            ) from error


def within(places: Places, path: Path) -> str:
    """The path under which a backup, whose paths begin at the root, stores a file."""
    return f"/{path.relative_to(places.root)}"


def _choice(
    places: Places, repository: Repository, password: bytes, snapshot: str
) -> tuple[str, Description]:
    """The snapshot's id and description; BackupError for one that must not be restored here."""
    rows = repository.snapshots(password, snapshot)
    if len(rows) != 1:
        raise BackupError(
            f"{repository.location} has {len(rows)} snapshots {snapshot}: choose one from `llmkeep backup list`"
        )
    identity = str(rows[0]["id"])
    facts = Description.read(
        repository.restic(password, "dump", identity, within(places, places.backup_description))
    )
    unfinished = json.loads(places.restoring.read_bytes())["snapshot"] if places.restoring.exists() else None
    if unfinished not in {None, identity}:
        raise BackupError(
            f"the restore of snapshot {unfinished[:8]} was interrupted on this machine: finish it with --snapshot "
            f"{unfinished[:8]}, or use a blank machine"
        )
    if unfinished is None and places.root_certificate.exists():
        raise BackupError(
            f"this machine already has a certificate authority ({places.root_certificate}), which a restore does not "
            "overwrite: use a blank machine, and run bootstrap there with --restore"
        )
    here = contents.serial(places)
    if facts.serial > here:
        raise BackupError(
            f"the backup was written by bundle serial {facts.serial}, but this machine has {here}: run bootstrap from "
            f"bundle {facts.serial} or a newer one"
        )
    if (signer := signing.fingerprint(places.bundle_keyring)) != facts.signer:
        raise BackupError(
            f"the backup belongs to an estate whose bundles are signed by {facts.signer}, but this machine was set up from "
            f"a bundle signed by {signer}: use a backup and a bundle of the same estate"
        )
    return identity, facts


def _skip_numbers(places: Places) -> None:
    """Skip the numbers of releases and policies that may have been issued after the backup."""
    if places.publish_serial.exists():
        write(places.publish_serial, f"{int(places.publish_serial.read_text()) + GAP}\n".encode(), 0o644)
    revision = places.policy_bundle.with_name("revision.json")
    last = json.loads(revision.read_bytes())
    write(revision, json.dumps(last | {"floor": last["revision"] + GAP}).encode() + b"\n", 0o644)


def _message(facts: Description, snapshot: str, names: list[str]) -> str:
    releases = "".join(f"\n  {release}: llmkeep release add FOLDER" for release in facts.releases)
    return (
        f"restored snapshot {snapshot[:8]} of {facts.created}, host {facts.host}, root certificate sha256 {facts.root}; "
        f"compare it with your written copy. {len(names)} secrets are sealed to this machine"
        + (
            f"\nonly the signatures of these releases were restored; add their files from the medium:{releases}"
            if releases
            else ""
        )
        + "\nnext: llmkeep audit collect -i INVENTORY, which detects anything recorded after the backup, then "
        + "llmkeep site -i INVENTORY, which changes no other host"
    )
