"""A backup onto new hardware, which has run `bootstrap --restore` and nothing else.

What comes back is what the estate trusts, so nothing on any other host changes. A restore that was cut off goes on.
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
    """Restore a snapshot ("latest": the newest) by the escrow key; returns a message for the operator.

    Raises BackupError: of a backup that will not do before anything has changed.
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
            f"the snapshot {identity[:8]} of {facts.created} is restored and not whole: {error}. Try an older one on "
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
                f"{key} does not open the backup at {repository.location}, which is encrypted to another escrow key: "
                "bring the key of its estate"
            ) from error


def within(places: Places, path: Path) -> str:
    """A path as it is in a backup, which begins at the root."""
    return f"/{path.relative_to(places.root)}"


def _choice(
    places: Places, repository: Repository, password: bytes, snapshot: str
) -> tuple[str, Description]:
    """The snapshot's id, and what it says of itself; BackupError for one that must not be restored here."""
    rows = repository.snapshots(password, snapshot)
    if len(rows) != 1:
        raise BackupError(
            f"{repository.location} has {len(rows)} snapshots {snapshot}: choose one of `llmkeep backup list`"
        )
    identity = str(rows[0]["id"])
    facts = Description.read(
        repository.restic(password, "dump", identity, within(places, places.backup_description))
    )
    unfinished = json.loads(places.restoring.read_bytes())["snapshot"] if places.restoring.exists() else None
    if unfinished not in {None, identity}:
        raise BackupError(
            f"the restore of snapshot {unfinished[:8]} was cut off here: end that with --snapshot "
            f"{unfinished[:8]}, or take a blank machine"
        )
    if unfinished is None and places.root_certificate.exists():
        raise BackupError(
            f"this machine has an estate's authority already, {places.root_certificate}: nothing is restored over it; "
            "take a blank machine, and run bootstrap there with --restore"
        )
    here = contents.serial(places)
    if facts.serial > here:
        raise BackupError(
            f"the backup was written by bundle serial {facts.serial}, and this machine has {here}: run bootstrap of "
            f"{facts.serial} or a newer one"
        )
    if (signer := signing.fingerprint(places.bundle_keyring)) != facts.signer:
        raise BackupError(
            f"the backup is of an estate whose bundles {facts.signer} signs, and this machine was made from a bundle of "
            f"{signer}: bring this estate's backup, or that estate's bundle"
        )
    return identity, facts


def _skip_numbers(places: Places) -> None:
    """Leave a gap after the numbers of releases and policies, whichever of them were issued after the backup."""
    if places.publish_serial.exists():
        write(places.publish_serial, f"{int(places.publish_serial.read_text()) + GAP}\n".encode(), 0o644)
    revision = places.policy_bundle.with_name("revision.json")
    last = json.loads(revision.read_bytes())
    write(revision, json.dumps(last | {"floor": last["revision"] + GAP}).encode() + b"\n", 0o644)


def _message(facts: Description, snapshot: str, names: list[str]) -> str:
    releases = "".join(f"\n  {release}: llmkeep release add FOLDER" for release in facts.releases)
    return (
        f"restored snapshot {snapshot[:8]} of {facts.created}, host {facts.host}, root certificate sha256 {facts.root}; compare "
        f"it with your paper. {len(names)} secrets are sealed to this machine"
        + (
            f"\nof these releases only the signatures are here; bring the files from their medium:{releases}"
            if releases
            else ""
        )
        + "\nnext: llmkeep audit collect -i INVENTORY, which finds what was recorded after the backup, then "
        + "llmkeep site -i INVENTORY, which changes no other host"
    )
