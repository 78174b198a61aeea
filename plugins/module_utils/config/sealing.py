"""Secrets sealed to this host by systemd-creds (its TPM and a key on its disk; without a TPM that key alone).

They pass through pipes, never through arguments, the environment or files.
"""

from __future__ import annotations

import subprocess
import tempfile

SECONDS = 60
ENCRYPT = ("openssl", "cms", "-encrypt", "-binary", "-aes-256-gcm", "-aes256-wrap", "-outform", "PEM")


class Failed(Exception):
    """A step failed; the message says which, with what output, and what to do."""


def piped(argv: list[str], content: bytes, brings: str) -> bytes:
    """Output of a program that receives or returns a secret by pipe."""
    what = " ".join(argv[:2])
    try:
        done = subprocess.run(argv, input=content, capture_output=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise Failed(f"{argv[0]} is not installed on this host; {brings} installs it") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{what} did not end within {SECONDS} s") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        raise Failed(f"{what} ended with {done.returncode}: {words}")
    return done.stdout


def systemd_creds(verb: str, name: str, content: bytes) -> bytes:
    return piped(["systemd-creds", verb, f"--name={name}", "-", "-"], content, "systemd 250 or later")


def seal(name: str, secret: bytes) -> bytes:
    return systemd_creds("encrypt", name, secret)


def unseal(name: str, sealed: bytes) -> bytes:
    """Decrypt a sealed secret; Failed if it was sealed under another name or on another host."""
    return systemd_creds("decrypt", name, sealed)


def encrypted_to(certificate: str, secret: bytes) -> str:
    """CMS (PEM) of the secret, which only the holder of the certificate's key opens."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as recipient:
        recipient.write(certificate)
        recipient.flush()
        try:
            cms = piped(
                [*ENCRYPT, "-recip", recipient.name, "-keyopt", "ecdh_kdf_md:sha256"],
                secret,
                "the package openssl",
            )
        except Failed as problem:
            raise Failed(
                f"the secret was not encrypted to the certificate of the other host: {problem}. The certificate needs an "
                "elliptic-curve key, like the one from role pki (/etc/llmkeep/pki/host.pem)"
            ) from problem
    return cms.decode()
