"""`llmkeep backup create | verify | list | restore`: store the control node's state elsewhere, and restore it on new hardware.

A backup contains the certificate authority, the policy, keys, all secrets sealed to this host, the audit record,
heads, registers, the inventory, the SSH key, and the signatures of releases. docs/operate/backup.md lists the rest
and where it is. On another machine, only the escrow key opens a backup.

Exit codes: 0 done; 1 refused or failed, with the reason; 9 the escrow key's passphrase is wrong, or cannot be had.
"""

import argparse
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmkeep.backup import contents, restore
from llmkeep.backup.contents import Description
from llmkeep.backup.repository import WHOLE, BackupError, Missing, Partial, Repository, made_at
from llmkeep.durable import alone, write
from llmkeep.errors import printable
from llmkeep.escrow import encrypt_to
from llmkeep.pki.authority import fingerprint, load
from llmkeep.places import BACKUP_PASSWORD, Places
from llmkeep.sealing import seal, unseal

ATTEMPTS = 3
PREPARING = "preparing"  # tag of what is in the repository before a backup, which it then takes from there
AHEAD = timedelta(hours=1)  # that the clock of the last backup may have been


@dataclass(frozen=True)
class Settings:
    """The settings that role backup writes.

    `keep`: how many daily, weekly and monthly backups to keep; `paths`: further paths to back up.
    """

    repository: str
    keep: dict[str, int] = field(default_factory=lambda: {"daily": 14, "weekly": 8, "monthly": 12})
    paths: list[str] = field(default_factory=list)


def settings(places: Places) -> Settings:
    """The backup settings of this control node; BackupError if there are none."""
    try:
        return Settings(**json.loads(places.backup_settings.read_bytes()))
    except FileNotFoundError as error:
        raise BackupError(
            "no backup is set up here: set backup_repository in the inventory, and run `llmkeep site --tags backup`"
        ) from error
    except (ValueError, TypeError) as error:
        raise BackupError(
            f"{places.backup_settings} cannot be read ({error}): `llmkeep site --tags backup` rewrites it"
        ) from error


@dataclass(frozen=True)
class Standing:
    """A repository that this control node may change. `backups`: restic's description of each, oldest first."""

    settings: Settings
    repository: Repository
    password: bytes
    backups: list[dict[str, Any]]

    def restic(self, *words: str, folder: Path = Path("/")) -> str:
        return self.repository.restic(self.password, *words, folder=folder)


@contextmanager
def standing(places: Places, begin: bool = False) -> Iterator[Standing]:
    """Lock this control node's repository. BEGIN: create it if it was never created."""
    config = settings(places)
    repository = Repository(config.repository)
    folder = places.backup_secrets.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with alone(folder):
        if not places.backup_password.exists():
            places.backup_password.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            secret = secrets.token_hex(32).encode()
            write(places.backup_password, seal(secret, BACKUP_PASSWORD), 0o400)
        password = unseal(places.backup_password.read_bytes(), BACKUP_PASSWORD)
        last = places.backup_begun.read_text() if places.backup_begun.exists() else ""
        try:
            rows = repository.snapshots(password)
        except Missing as error:
            if last == config.repository:
                raise BackupError(
                    f"there is no repository at {last}, which held backups of this host: mount its disk; if the backups are "
                    f"lost, remove {places.backup_begun}, and the next backup starts a new repository"
                ) from error
            if not begin:
                raise
            repository.restic(password, "init")
            rows = []
        if last != config.repository:
            repository.keep_password(encrypt_to(places.escrow_certificate, password))
            write(places.backup_begun, config.repository.encode(), 0o644)
        yield Standing(config, repository, password, rows)


def create(places: Places) -> str:
    """Back up this control node, and remove old backups; returns a message for the operator."""
    with standing(places, begin=True) as current:
        if current.backups and made_at(newest := current.backups[-1]) > datetime.now(UTC) + AHEAD:
            raise BackupError(
                f"the newest backup in {current.settings.repository} was made at {newest['time'][:19]}, but this host's "
                "clock says "
                f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}: correct the clock, or remove that backup: restic forget "
                f"{newest['id'][:8]}"
            )
        contents.keep_secrets(places, places.escrow_certificate)
        contents.describe(places)
        without = [word for path in contents.excluded() for word in ("--exclude", path)]
        words = ["--json", *without, "--", *contents.paths(places, current.settings.paths)]
        # All of it while runs go on, and what changed since while none writes into the record, which takes seconds.
        with suppress(Partial):
            current.restic("backup", "--tag", PREPARING, *words, folder=places.root)
        with contents.record_at_rest():
            summary = json.loads(_whole(current, places, words).splitlines()[-1])
        current.restic("forget", "--tag", PREPARING, "--unsafe-allow-remove-all")
        policy = [
            word for unit, count in current.settings.keep.items() for word in (f"--keep-{unit}", str(count))
        ]
        current.restic("forget", "--tag", WHOLE, "--group-by", "", *policy, "--prune")
        size = f"{summary['total_files_processed']} files, {summary['total_bytes_processed'] / 1e6:.1f} MB"
        return f"{current.settings.repository}: snapshot {summary['snapshot_id'][:8]}, {size}"


def _whole(current: Standing, places: Places, words: list[str]) -> str:
    """restic's words on a backup that has every file: other programs of the control node replace theirs at any moment."""
    for _ in range(ATTEMPTS - 1):
        with suppress(Partial):
            return current.restic("backup", "--tag", WHOLE, *words, folder=places.root)
    return current.restic("backup", "--tag", WHOLE, *words, folder=places.root)


def verify(places: Places) -> str:
    """Read the whole repository in place, and mark the newest backup as verified; returns a message for the operator."""
    with standing(places) as current:
        place = current.settings.repository
        if not current.backups:
            raise BackupError(f"{place} has no backup: make one with `llmkeep backup create`")
        newest = current.backups[-1]
        current.restic("check", "--read-data")
        current.repository.encrypted_password()
        facts = Description.read(
            current.restic("dump", newest["id"], restore.within(places, places.backup_description))
        )
        if (root := fingerprint(load(places.root_certificate))) != facts.root:
            raise BackupError(
                f"{place}: the newest backup belongs to the estate with root certificate {facts.root}, but this estate's "
                f"root certificate is {root}: give this estate its own repository"
            )
        note = {
            "snapshot": newest["id"],
            "created": made_at(newest).timestamp(),
            "verified": datetime.now(UTC).timestamp(),
            "repository": place,
        }
        write(places.backup_verified, json.dumps(note).encode() + b"\n", 0o644)
        count = len(current.backups)
        return f"{place}: all {count} backups are intact; the newest was made at {newest['time'][:19]}"


def overview(places: Places) -> str:
    """One line per backup, oldest first."""
    with standing(places) as current:
        newest = (
            json.loads(places.backup_verified.read_bytes())["snapshot"]
            if places.backup_verified.exists()
            else None
        )
        lines = [
            f"{row['id'][:8]}  {row['time'][:19]}  {row['hostname']}{'  verified' * (row['id'] == newest)}"
            for row in current.backups
        ]
        empty = f"{current.settings.repository} has no backup: make one with `llmkeep backup create`"
        return "\n".join(lines) or empty


# ---------------------------------------------------------------- command line
def _command(verb: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        print(printable(verb(arguments)))
        return 0

    return run


def _here(verb: Callable[[Places], str]) -> Callable[[argparse.Namespace], str]:
    return lambda arguments: verb(arguments.places)


def _restore(arguments: argparse.Namespace) -> str:
    return restore.restore(
        arguments.places,
        Repository(arguments.repository),
        arguments.escrow_key,
        arguments.passphrase_file,
        arguments.snapshot,
    )


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep backup create | verify | list | restore`."""
    parser = subparsers.add_parser("backup", help="back up and restore the control node", description=__doc__)
    parser.set_defaults(places=Places())
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, words, verb in (
        ("create", "back up this control node, and remove old backups", create),
        ("verify", "read every byte of the repository", verify),
        ("list", "list the backups, oldest first", overview),
    ):
        verbs.add_parser(name, help=words, description=__doc__).set_defaults(run=_command(_here(verb)))
    back = verbs.add_parser(
        "restore", help="onto a blank machine, after `bootstrap --restore`", description=__doc__
    )
    back.add_argument("repository", help="absolute path of a folder, or sftp:USER@HOST:/FOLDER")
    back.add_argument("--escrow-key", type=Path, required=True, help="path of the escrow key on its medium")
    back.add_argument(
        "--passphrase-file", type=Path, help="file or pipe with its passphrase (default: ask once)"
    )
    back.add_argument(
        "--snapshot",
        default="latest",
        metavar="ID",
        help="snapshot id from `restic snapshots` (default: the newest)",
    )
    back.set_defaults(run=_command(_restore))
