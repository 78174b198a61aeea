"""What a backup of the control node has in it.

Secrets that are sealed to this host open on this host alone. A backup has them all in one file that is encrypted to the escrow
certificate, so neither the repository's password nor its host reveals them.
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
    """What a backup says of itself. `serial`: the bundle's; `signer`: whose bundles this estate takes; `root`: sha256 of the
    root certificate; `releases`: `NAME SERIAL`, of which only manifests are in it.
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
        """Of this control node, now."""
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
        """Of a backup, from the file in it; BackupError for one that this llmkeep does not know."""
        document = json.loads(text)
        if document.get("format") != FORMAT:
            raise BackupError(
                f"the backup has format {document.get('format')}, and this llmkeep reads {FORMAT}: it was written by bundle "
                f"serial {document.get('serial')}; run bootstrap of that one, or of a newer one"
            )
        return cls(**document)


def serial(places: Places) -> int:
    """The highest serial of a bundle that was accepted here."""
    return int(places.bundle_serial.read_text())


def paths(places: Places, more: list[str]) -> list[str]:
    """What restic is given, from the root, of what is there. `more`: the operator's own."""
    root = places.root
    files = [root / path.lstrip("/") for path in (*FOLDERS, *more)]
    files += [
        path for pattern in SIGNED for path in root.glob(pattern) if path.is_symlink() or path.is_file()
    ]
    return sorted({str(path.relative_to(root)) for path in files if path.exists()})


def excluded() -> list[str]:
    """What restic leaves out of them: of bootstrap and of a restore what is theirs while they run."""
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
    """Write what is sealed to this host once more, encrypted to the escrow certificate. Secrets pass by pipes alone."""
    secrets = {}
    for path in sorted(places.sealed("").iterdir()):
        if not path.is_file() or path.name.startswith("."):  # what programs remember of a PIN
            continue
        try:
            secret = unseal(path.read_bytes(), path.name)
        except SealError as error:
            raise BackupError(
                f"{path} does not open on this host under its own name ({error}): it could not be restored; put it elsewhere, or "
                f"seal it with --name={path.name}"
            ) from error
        secrets[path.name] = {
            "secret": base64.b64encode(secret).decode(),
            "mode": path.stat().st_mode & 0o777,
        }
    write(places.backup_secrets, encrypt_to(certificate, json.dumps(secrets).encode()), 0o400)


def seal_secrets(places: Places, opened: bytes) -> list[str]:
    """Seal the secrets of a backup to this host; their names. Idempotent."""
    names = []
    for name, entry in json.loads(opened).items():
        path, secret = places.sealed(name), base64.b64decode(entry["secret"])
        if "/" in name or name.startswith("."):
            raise BackupError(
                f"the backup has a secret {name!r}, which is no file's name: it was not made by llmkeep"
            )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(path, seal(secret, name), entry["mode"])
        names.append(name)
    return names


@contextmanager
def record_at_rest() -> Iterator[None]:
    """Nothing is written into the control node's record meanwhile: its heads, tip and records are copied as one."""
    descriptor = os.open(runs.FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # what llmproof.chain holds to write
        yield
    finally:
        os.close(descriptor)


def describe(places: Places) -> None:
    """Write what this backup says of itself."""
    write(places.backup_description, json.dumps(asdict(Description.of(places))).encode() + b"\n", 0o444)
