"""Seal the control node's secrets to this host, or encrypt them to the escrow key.

They pass between programs by standard input and output only, never by a file, an argument or the environment.
"""

import subprocess
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from llmkeep.errors import LlmkeepError


class SealError(LlmkeepError):
    """A secret could not be sealed or decrypted. The message says what is wrong, the value seen, and the way out."""


def program(argv: list[str], data: bytes) -> bytes:
    """Standard output of ARGV fed with DATA; its own words become the error."""
    done = subprocess.run(argv, input=data, capture_output=True, check=False, timeout=60)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise SealError(f"`{' '.join(argv[:2])}` exited {done.returncode}: {words}")
    return done.stdout


def seal(secret: bytes, name: str) -> bytes:
    """Encrypt SECRET to this host (and its TPM, if any) under NAME, which `unseal` needs."""
    has_tpm = (
        subprocess.run(
            ["systemd-analyze", "has-tpm2", "--quiet"], capture_output=True, check=False
        ).returncode
        == 0
    )
    key = "host+tpm2" if has_tpm else "host"
    return program(["systemd-creds", "encrypt", f"--with-key={key}", f"--name={name}", "-", "-"], secret)


def unseal(sealed: bytes, name: str) -> bytes:
    """Decrypt a sealed secret in memory."""
    return program(["systemd-creds", "decrypt", f"--name={name}", "-", "-"], sealed)


def encrypt_to(escrow: Path, secret: bytes) -> bytes:
    """SECRET as a CMS AuthEnvelopedData (PEM) that only the owner of the escrow key can open."""
    certificate = x509.load_pem_x509_certificate(escrow.read_bytes())
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < 3072:
        seen = f"RSA of {key.key_size} bits" if isinstance(key, rsa.RSAPublicKey) else type(key).__name__
        raise SealError(f"{escrow} holds {seen}: the escrow certificate must have an RSA "
                       "key of at least 3072 bits; make a new one with `llmkeep keys init` on the builder")  # fmt: skip
    return program(
        ["openssl", "cms", "-encrypt", "-aes-256-gcm", "-binary", "-outform", "PEM", "-recip", str(escrow),
         "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"],
        secret,
    )  # fmt: skip
