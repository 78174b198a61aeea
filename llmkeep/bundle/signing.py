"""Signatures of the bundle and of releases: OpenPGP made by `sq`, checked by `sqv`, which every Debian 13 has.

A folder of keys holds signing.key (secret), keyring.pgp (its certificate), escrow.key (secret), escrow.pem.
`llmkeep keys init` makes throw-away ones for the lab. An estate brings its own, made where they stay offline.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from llmkeep.errors import LlmkeepError

SQ = ["sq", "--home", "none", "--batch"]  # no key store, no configuration: the given files only


class SignatureRefused(LlmkeepError):
    """The signature is missing, wrong, or by an unknown key."""


def init(folder: Path) -> None:
    """Generate missing keys. Existing ones stay: a new signing key would orphan every estate."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        if not (folder / "keyring.pgp").exists():
            key, certificate = Path(aside, "signing.key"), Path(aside, "keyring.pgp")
            key.write_text(generate("llmkeep bundle", Path(aside, "revocation.pgp")))
            certify(key, certificate)
            for file in (key, Path(aside, "revocation.pgp"), certificate):
                file.chmod(0o600)
                file.replace(folder / file.name)
        if not (folder / "escrow.pem").exists():
            key, certificate = Path(aside, "escrow.key"), Path(aside, "escrow.pem")
            _call(
                [
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:4096",
                    "-noenc",
                    "-days",
                    "3650",
                    "-sha256",
                    "-subj",
                    "/CN=llmkeep escrow",
                    "-addext",
                    "keyUsage=critical,keyEncipherment",
                    "-keyout",
                    str(key),
                    "-out",
                    str(certificate),
                ]
            )
            for file in (key, certificate):
                file.chmod(0o600)
                file.replace(folder / file.name)


def generate(name: str, revocation: Path) -> str:
    """Generate a signing-only key without a password, and its revocation certificate."""
    uses = ["--own-key", "--name", name, "--cannot-encrypt", "--cannot-authenticate", "--expiration", "10y"]
    return _call(
        [*SQ, "key", "generate", *uses, "--without-password", "--output", "-", "--rev-cert", str(revocation)]
    )


def certify(key: Path, certificate: Path) -> None:
    """Write the public part of a key."""
    _call([*SQ, "key", "delete", "--cert-file", str(key), "--output", str(certificate)])


def fingerprint(certificate: Path) -> str:
    """The primary key's fingerprint, 40 hex digits."""
    return fingerprints(certificate)[0]


def fingerprints(keyring: Path) -> list[str]:
    """Fingerprints of the primary keys in a file, in hex. LlmkeepError if there is none."""
    text = _call([*SQ, "inspect", str(keyring)])
    if not (found := re.findall(r"Fingerprint: ([0-9A-F]{40}(?:[0-9A-F]{24})?)\b", text)):
        raise LlmkeepError(
            f"{keyring} is no OpenPGP certificate: run `llmkeep keys init`, or give the right file"
        )
    return list(map(str, found))


def sign(key: Path, file: Path, signature: Path) -> None:
    """A detached signature beside the file."""
    _call([*SQ, "sign", "--signer-file", str(key), "--signature-file", str(signature), str(file)])


def sign_inline(key: Path, file: Path, signed: Path) -> None:
    """A cleartext signature around the file, as apt's InRelease."""
    _call([*SQ, "sign", "--signer-file", str(key), "--cleartext", "--output", str(signed), str(file)])


def verify(keyring: Path, file: Path, content: bytes, signature: bytes) -> str:
    """Fingerprint of the signer of `content`, whose key must be in `keyring`. Needs only `sqv`.

    `file` names the content in messages. It is not read, since it may have changed since its content was.
    """
    with tempfile.TemporaryDirectory() as aside:
        copies = Path(aside, "signature"), Path(aside, "content")
        for copy, data in zip(copies, (signature, content), strict=True):
            copy.write_bytes(data)
        run = subprocess.run(
            ["sqv", "--keyring", str(keyring), "--signature-file", *map(str, copies)],
            capture_output=True,
            text=True,
            check=False,
        )
    if "Failed to parse keyring" in run.stderr:
        raise LlmkeepError(
            f"{keyring} is not a file of OpenPGP keys: give the keyring that you trust with --keyring"
        )
    if run.returncode != 0:
        raise SignatureRefused(
            f"{file} is not signed by a key of {keyring}: {run.stderr.strip() or 'sqv says no'}: "
            "do not use it, fetch it again from a source that you trust"
        )
    return run.stdout.split()[0]


def _call(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LlmkeepError(f"{command[0]} is not installed: apt-get install {command[0]}") from error
    if run.returncode != 0:
        raise LlmkeepError(f"{command[0]} failed: {run.stderr.strip()}")
    return run.stdout


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep keys init`."""
    verbs = subparsers.add_parser("keys", help="throw-away signing and escrow keys").add_subparsers(
        required=True
    )
    parser = verbs.add_parser("init", help="make signing and escrow keys without a password, for a lab")
    parser.add_argument("folder", type=Path)
    parser.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    init(arguments.folder)
    print(f"{arguments.folder}: bundles are signed by {fingerprint(arguments.folder / 'keyring.pgp')}")
    return 0
