"""Signatures of the bundle and of releases: OpenPGP made by `sq`, checked by `sqv`, which every Debian 13 has.

A folder of keys holds signing.key (secret), keyring.pgp (its certificate), revocation.pgp, and escrow.pem, the
certificate of a key that is kept elsewhere. `llmkeep keys` makes them.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkeep import passphrase
from llmkeep.bundle import openpgp, token_key
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError
from llmkeep.passphrase import PassphraseError
from llmkeep.sealing import in_memory

SQ = ["sq", "--home", "none", "--batch"]  # no key store, no configuration: the given files only
KEY, CERTIFICATE, REVOCATION = "signing.key", "keyring.pgp", "revocation.pgp"
PKCS11 = "signing-pkcs11.json"  # instead of KEY: where in a token it is
Signer = Path | openpgp.Key


class SignatureRefused(LlmkeepError):
    """The signature is missing, wrong, or made by an unknown key."""


def init(folder: Path, word: str | None) -> None:
    """Generate the key if there is none. An existing one stays: a new signing key would orphan every estate.

    `word`: its passphrase, None for a lab's. The certificate is written last and marks completion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if (folder / CERTIFICATE).exists():
        return
    with tempfile.TemporaryDirectory(prefix="llmkeep-") as aside:
        revocation, certificate = Path(aside, REVOCATION), Path(aside, CERTIFICATE)
        secret = generate("llmkeep bundle", revocation, word).encode()
        with in_memory(secret) as key:
            certify(key, certificate)
        (folder / PKCS11).unlink(missing_ok=True)  # of an attempt that was cut short
        write(folder / KEY, secret, 0o600)
        write(folder / REVOCATION, revocation.read_bytes(), 0o600)
        write(folder / CERTIFICATE, certificate.read_bytes(), 0o600)


def init_in_token(folder: Path, token: token_key.Token, pin: str) -> None:
    """The same with a key that is made in a PKCS#11 token, or is there already, and never leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    key = token_key.made(token, pin)
    write(folder / PKCS11, token_key.settings(token, key), 0o600)
    write(folder / REVOCATION, openpgp.revocation(key), 0o600)
    write(folder / CERTIFICATE, openpgp.certificate(key, "llmkeep bundle"), 0o600)


def key_file(folder: Path) -> Path:
    """The signing key's file in a folder of keys, or the one that says in which token it is."""
    return folder / (PKCS11 if (folder / PKCS11).exists() else KEY)


def generate(name: str, revocation: Path, word: str | None) -> str:
    """Generate a signing-only key, with the passphrase `word` if there is one, and its revocation certificate."""
    uses = ["--own-key", "--name", name, "--cannot-encrypt", "--cannot-authenticate", "--expiration", "10y"]
    argv = [*SQ, "key", "generate", *uses, "--output", "-", "--rev-cert", str(revocation)]
    if word is None:
        return _call([*argv, "--without-password"])
    with in_memory(word.encode()) as file:
        return _call([*argv, "--new-password-file", str(file)])


def has_passphrase(key: Path, name: str = "") -> bool:
    """Whether KEY, called `name` in messages, is encrypted; LlmkeepError if it is not a private OpenPGP key."""
    text = _call([*SQ, "inspect", str(key)])
    if "Secret key:" not in text:
        raise LlmkeepError(f"{name or key} is not a private OpenPGP key: restore it from a backup")
    return "Secret key: Unencrypted" not in text


@contextmanager
def signer(file: Path, passphrase_file: Path | None) -> Iterator[Signer]:
    """The bundle's signing key, for as many signatures as the context makes; passphrase or PIN is asked for once."""
    if file.name == PKCS11:
        yield token_key.opened(file, passphrase.existing(passphrase_file, token_key.named(file)))
    else:
        with unlocked(file, passphrase_file) as key:
            yield key


@contextmanager
def unlocked(key: Path, passphrase_file: Path | None, name: str = "") -> Iterator[Path]:
    """Path of KEY without its passphrase, in memory, for as many signatures as the context makes.

    The passphrase is read from the file, else asked for, once. `name`: what to call the key. Raises PassphraseError.
    """
    if not has_passphrase(key, name):
        yield key
        return
    with in_memory(passphrase.existing(passphrase_file, name or str(key)).encode()) as word:
        command = ["key", "password", "--clear-password", "--cert-file", str(key), "--output", "-"]
        try:
            secret = _call([*SQ, "--password-file", str(word), *command])
        except LlmkeepError as error:
            if "Unable to decrypt secret key material" not in str(error):
                raise
            raise PassphraseError(
                f"the passphrase does not open {name or key}: nothing was signed or changed; run it again with the "
                "correct one"
            ) from None
    with in_memory(secret.encode()) as opened:
        yield opened


def with_passphrase(opened: Path, word: str) -> bytes:
    """An unlocked key, encrypted with the passphrase `word`, after a test that it opens with it."""
    with in_memory(word.encode()) as file:
        command = ["key", "password", "--cert-file", str(opened), "--output", "-"]
        secret = _call([*SQ, *command, "--new-password-file", str(file)]).encode()
        with in_memory(secret) as key, unlocked(key, file) as again:
            if again == key or fingerprint(again) != fingerprint(opened):
                raise LlmkeepError("sq did not encrypt the key, and nothing was changed: report this")
    return secret


def certify(key: Path, certificate: Path) -> None:
    """Write the public part of a key."""
    _call([*SQ, "key", "delete", "--cert-file", str(key), "--output", str(certificate)])


def fingerprint(certificate: Path) -> str:
    """The primary key's fingerprint, 40 hex digits."""
    return fingerprints(certificate)[0]


def fingerprints(keyring: Path) -> list[str]:
    """Fingerprints of the primary keys in a file, in hex. LlmkeepError if there is none."""
    text = _call([*SQ, "inspect", str(keyring)])
    if not (marks := re.findall(r"Fingerprint: ([0-9A-F]{40}(?:[0-9A-F]{24})?)\b", text)):
        raise LlmkeepError(
            f"{keyring} is not an OpenPGP certificate: run `llmkeep keys init`, or give the correct file"
        )
    return list(map(str, marks))


def sign(key: Signer, file: Path, signature: Path) -> None:
    """A detached signature beside the file."""
    if isinstance(key, openpgp.Key):
        signature.write_bytes(openpgp.detached(key, file.read_bytes(), int(time.time())))
        return
    _call([*SQ, "sign", "--signer-file", str(key), "--signature-file", str(signature), str(file)])


def sign_inline(key: Signer, file: Path, signed: Path) -> None:
    """A cleartext signature around the file, as apt's InRelease."""
    if isinstance(key, openpgp.Key):
        signed.write_text(openpgp.cleartext(key, file.read_text(), int(time.time())))
        return
    _call([*SQ, "sign", "--signer-file", str(key), "--cleartext", "--output", str(signed), str(file)])


def verify(keyring: Path, file: Path, content: bytes, signature: bytes) -> str:
    """Fingerprint of the signer of `content`, whose key must be in `keyring`. Needs only `sqv`.

    `file` names the content in messages. It is not read, since it may have changed in the meantime.
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
            f"{file} is not signed by a key of {keyring}: {run.stderr.strip() or 'sqv gave no reason'}: "
            "do not use it; fetch it again from a trusted source"
        )
    return run.stdout.split()[0]


def _call(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LlmkeepError(f"{command[0]} is not installed: apt-get install {command[0]}") from error
    if run.returncode != 0:
        # What follows the message is a backtrace.
        words = re.split(r"\n\s+0: ", run.stderr)[0].strip()
        raise LlmkeepError(f"{command[0]} failed: {words}")
    return run.stdout
