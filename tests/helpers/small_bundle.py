"""A signed bundle of a few files, and what can go wrong with one: for tests of verify and of bootstrap."""

import base64
import datetime
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from llmkeep.bundle import cache, manifest, signing
from llmkeep.bundle.manifest import Entry, Manifest

BOOTSTRAP = Path(manifest.__file__).with_name("bootstrap.sh")
ESCROW = base64.encodebytes(b"a certificate").decode()


def signing_keys(folder: Path) -> Path:
    """A signing key and its certificate; no escrow key, whose 4096 bits take seconds."""
    (folder / "escrow.pem").touch()
    signing.init(folder, None)
    return folder


def write(folder: Path, keys: Path, serial: int = 7, days: int = 30) -> Path:
    """Fill `folder` with a bundle of this serial that expires in so many days."""
    signer = signing.fingerprint(keys / "keyring.pgp")
    for path, content in {
        "wheels/control/requirements.txt": "nothing==1.0\n",
        "escrow.pem": f"-----BEGIN CERTIFICATE-----\n{ESCROW}-----END CERTIFICATE-----\n",
        "models/small/weights": "\0" * 5000,
        "apt/pool/odd+name~1_2.deb": "a package",
        "bootstrap": BOOTSTRAP.read_text().replace("@SIGNER@", signer),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    shutil.copy(keys / "keyring.pgp", folder / "keyring.pgp")
    sign(folder, keys, serial, days)
    return folder


def sign(folder: Path, keys: Path, serial: int, days: int, kind: str = manifest.BUNDLE) -> None:
    """Write the manifest of what lies there, of the type `kind`, and sign it."""
    for name in (manifest.NAME, manifest.SIGNATURE):
        (folder / name).unlink(missing_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    entries = [
        Entry(
            path, (folder / path).stat().st_size, cache.sha256(folder / path), "text/plain", "MIT", "test", ""
        )
        for path in manifest.walk(folder)
    ]
    expires = now + datetime.timedelta(days=days)
    made = Manifest(
        type=kind,
        serial=serial,
        profile="lab",
        created=now.strftime(manifest.TIME),
        expires=expires.strftime(manifest.TIME),
        signer=signing.fingerprint(keys / "keyring.pgp"),
        lock_sha256="0" * 64,
        inputs_sha256="0" * 64,
        files=entries,
    )
    manifest.write(folder, made)
    with signing.signer(signing.key_file(keys), keys / "pin") as key:
        signing.sign(key, folder / manifest.NAME, folder / manifest.SIGNATURE)


def _flip_a_bit(folder: Path, _: Path) -> None:
    path = folder / "models/small/weights"
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)


def _flip_a_bit_of_the_manifest(folder: Path, _: Path) -> None:
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b'"licence": "MIT"', b'"licence": "MIU"', 1))


def _lose_a_file(folder: Path, _: Path) -> None:
    (folder / "apt/pool/odd+name~1_2.deb").unlink()


def _add_a_file(folder: Path, _: Path) -> None:
    (folder / "models/small/added").write_text("")


def _replace_a_file_by_a_link(folder: Path, _: Path) -> None:
    path = folder / "models/small/weights"
    path.rename(folder.parent / "weights-elsewhere")
    path.symlink_to(folder.parent / "weights-elsewhere")


def _add_a_linked_folder(folder: Path, _: Path) -> None:
    (folder / "models/linked").symlink_to("/etc")


def _strip_the_signature(folder: Path, _: Path) -> None:
    (folder / manifest.SIGNATURE).unlink()


def _empty_the_signature(folder: Path, _: Path) -> None:
    (folder / manifest.SIGNATURE).write_bytes(b"")


def _sign_with_a_foreign_key(folder: Path, foreign: Path) -> None:
    shutil.copy(foreign / "keyring.pgp", folder / "keyring.pgp")
    sign(folder, foreign, 7, 30)


# What is done to the bundle, the exit code, and a word of the message.
DAMAGE: dict[str, tuple[Callable[[Path, Path], None], int, str]] = {
    "one flipped bit": (_flip_a_bit, manifest.DAMAGED, "models/small/weights"),
    "one flipped bit of the manifest": (_flip_a_bit_of_the_manifest, manifest.UNSIGNED, "do not use"),
    "a missing file": (_lose_a_file, manifest.DAMAGED, "missing: apt/pool/odd+name~1_2.deb"),
    "an extra file": (_add_a_file, manifest.DAMAGED, "not in the manifest: models/small/added"),
    "a link for a file": (_replace_a_file_by_a_link, manifest.DAMAGED, ""),
    "a linked folder": (_add_a_linked_folder, manifest.DAMAGED, ""),
    "a stripped signature": (_strip_the_signature, manifest.UNSIGNED, "unsigned"),
    "an empty signature": (_empty_the_signature, manifest.UNSIGNED, "do not use"),
    "a foreign signature": (_sign_with_a_foreign_key, manifest.UNSIGNED, "do not use"),
}


def snapshot(folder: Path) -> str:
    """Names, sizes and times of everything below, to see that nothing was changed."""
    command = ["find", str(folder), "-printf", "%P %s %T@ %l\n"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
