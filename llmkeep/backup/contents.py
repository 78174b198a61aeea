"""Contents of a backup of the control node.

Secrets sealed to this host can be opened only on this host. A backup contains all of them in one file that is
encrypted to the escrow certificate, so neither the repository's password nor its host reveals them.
"""

import base64
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from llmkeep.backup.repository import BackupError
from llmkeep.bundle import manifest, signing
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.durable import write
from llmkeep.escrow import encrypt_to
from llmkeep.pki.authority import fingerprint, load
from llmkeep.places import Places
from llmkeep.record import runs
from llmkeep.sealing import SealError, seal, unseal

FORMAT = 1
# All below them, but for what bootstrap makes for itself.
FOLDERS = ("etc/llmkeep", "var/lib/llmkeep", "var/log/llmkeep-audit", "root/.ssh", "etc/ssh/ssh_known_hosts")
SCRATCH = [
    "sums",
    "listed",
    "present",
    "table",
    "here",
    "new",
    "files",
    "links",
    "copies",
    "media",
    "carried",
]
# Of a release only what is signed: the weights are on a medium, and on the hosts.
SIGNED = ("srv/llmkeep/releases/*", "srv/llmkeep/releases/.*/MANIFEST.json*")


@dataclass(frozen=True)
class Description:
    """Description stored in a backup.

    `serial`: of the bundle; `signer`: fingerprint of the key whose bundles this estate accepts; `root`: sha256 of the
    root certificate; `releases`: `NAME SERIAL` of each release, whose manifest alone is in the backup.
    """

    host: str
    created: str
    serial: int
    signer: str
    root: str
    releases: list[str]
    format: int = FORMAT

    @classmethod
    def of(cls, places: Places) -> "Description":
        """Describe this control node at this moment."""
        releases = []
        for folder in sorted(places.releases.glob("[!.]*")):
            try:
                releases.append(f"{folder.name} {manifest.read(folder).serial}")
            except BundleRefused:
                continue  # not a release
        return cls(
            host=socket.gethostname(),
            created=datetime.now(UTC).replace(microsecond=0).isoformat(),
            serial=serial(places),
            signer=signing.fingerprint(places.bundle_keyring),
            root=fingerprint(load(places.root_certificate)),
            releases=releases,
        )

    @classmethod
    def read(cls, text: str) -> "Description":
        """Read the description of a backup from its file; BackupError for a format that this llmkeep does not know."""
        document = json.loads(text)
        if document.get("format") != FORMAT:
            raise BackupError(
                f"the backup has format {document.get('format')}, and this llmkeep reads {FORMAT}: it was written by bundle "
                f"serial {document.get('serial')}; run bootstrap from that bundle, or from a newer one"
            )
        return cls(**document)


def serial(places: Places) -> int:
    """The highest bundle serial accepted on this host."""
    return int(places.bundle_serial.read_text())


def paths(places: Places, more: list[str]) -> list[str]:
    """Existing paths to back up, relative to the root. `more`: paths added by the operator."""
    root = places.root
    files = [root / path.lstrip("/") for path in (*FOLDERS, *more)]
    files += [
        path for pattern in SIGNED for path in root.glob(pattern) if path.is_symlink() or path.is_file()
    ]
    return sorted({str(path.relative_to(root)) for path in files if path.exists()})


def excluded() -> list[str]:
    """Paths that restic excludes: the working files of bootstrap and of a restore."""
    names = [
        *SCRATCH,
        "bootstrap.lock",
        "restoring.json",
        "apt.log",
        "copy.bytes",
        "copy.log",
        "bundle.sources",
    ]
    return [f"/var/lib/llmkeep/{name}" for name in names]


# ---------------------------------------------------------------- sealed secrets
def keep_secrets(places: Places, certificate: Path) -> None:
    """Write the secrets sealed to this host again, encrypted to the escrow certificate. Secrets pass only through pipes."""
    secrets = {}
    for path in sorted(places.sealed("").iterdir()):
        if not path.is_file() or path.name.startswith("."):  # what programs remember of a PIN
            continue
        try:
            secret = unseal(path.read_bytes(), path.name)
        except SealError as error:
            raise BackupError(
                f"{path} cannot be unsealed on this host under its own name ({error}), so it could not be restored: move it "
                f"elsewhere, or seal it with --name={path.name}"
            ) from error
        secrets[path.name] = {
            "secret": base64.b64encode(secret).decode(),
            "mode": path.stat().st_mode & 0o777,
        }
    write(places.backup_secrets, encrypt_to(certificate, json.dumps(secrets).encode()), 0o400)


def seal_secrets(places: Places, opened: bytes) -> list[str]:
    """Seal the secrets of a backup to this host; returns their names. Idempotent."""
    names = []
    for name, entry in json.loads(opened).items():
        path, secret = places.sealed(name), base64.b64decode(entry["secret"])
        if "/" in name or name.startswith("."):
            raise BackupError(
                f"the backup has a secret {name!r}, which is not a valid file name: llmkeep did not make this backup"
            )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(path, seal(secret, name), entry["mode"])
        names.append(name)
    return names


@contextmanager
def record_at_rest() -> Iterator[None]:
    """Keep the control node's record unchanged within the context, so that heads, tip and records are copied
    consistently.
    """
    descriptor = os.open(runs.FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # what llmproof.chain holds to write
        yield
    finally:
        os.close(descriptor)


def describe(places: Places) -> None:
    """Write the description of this backup."""
    write(places.backup_description, json.dumps(asdict(Description.of(places))).encode() + b"\n", 0o444)
