"""The escrow key, made offline on a separate machine: only it decrypts data that the estate encrypts to its certificate.

Builder, bundle and control node have only the certificate. The key is PKCS#8, encrypted with AES-256 by a key that scrypt
(N=2^14, r=8, p=5) derives from the passphrase: what OWASP asks for in the 32 MiB that OpenSSL spends on reading one.

"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from llmkeep import passphrase
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError
from llmkeep.passphrase import PassphraseError
from llmkeep.sealing import SealError, in_memory, program

CERTIFICATE, KEY = "escrow.pem", "escrow.key"  # in their folder
BITS = 4096
DAYS = 3650
SCRYPT = ["-scrypt", "-scrypt_N", "16384", "-scrypt_r", "8", "-scrypt_p", "5"]


class EscrowError(LlmkeepError):
    """Refused. The message says what is wrong, the value seen, and the way out."""


def create(folder: Path, word: str | None) -> x509.Certificate:
    """Generate key and certificate into FOLDER. `word`: the passphrase, None for a lab's. Raises EscrowError if there are any.

    The certificate is written last and marks completion.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (folder / CERTIFICATE).exists():
        raise EscrowError(
            f"{folder / CERTIFICATE} already exists, and data encrypted to it needs its key: choose another folder"
        )
    key = rsa.generate_private_key(public_exponent=65537, key_size=BITS)
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    if word is not None:
        with in_memory(word.encode()) as file:
            argv = ["openssl", "pkcs8", "-topk8", *SCRYPT, "-v2", "aes-256-cbc", "-passout", f"file:{file}"]
            secret = program(argv, secret)
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llmkeep escrow")])
    uses = dict.fromkeys(
        ("digital_signature", "content_commitment", "data_encipherment", "key_agreement", "key_cert_sign",
         "crl_sign", "encipher_only", "decipher_only"),
        False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A machine that stays offline has a clock that nothing corrects.
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_encipherment=True, **uses), critical=True)
        .sign(key, hashes.SHA256())
    )
    write(folder / KEY, secret, 0o400)
    write(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o444)
    return certificate


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate (DER), as `openssl x509 -fingerprint -sha256` has it, without colons."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def load(file: Path, now: datetime | None = None) -> x509.Certificate:
    """The escrow certificate in FILE, if the estate can encrypt to it; raises EscrowError.

    A certificate without the extension KeyUsage may be used for everything (RFC 5280, section 4.2.1.3).
    """
    content, moment = file.read_bytes(), now or datetime.now(UTC)
    if b"PRIVATE KEY" in content:
        raise EscrowError(
            f"{file} holds a private key, which only the escrow key's own machine may have: delete it here, and give "
            f"{CERTIFICATE}"
        )
    try:
        certificate = x509.load_pem_x509_certificate(content)
        key = certificate.public_key()
        usage = [each.value for each in certificate.extensions if isinstance(each.value, x509.KeyUsage)]
    except ValueError as error:
        raise EscrowError(
            f"{file} is not a certificate in PEM: give the {CERTIFICATE} that `llmkeep keys escrow` made"
        ) from error
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < 3072:
        kind = f"RSA of {key.key_size} bits" if isinstance(key, rsa.RSAPublicKey) else type(key).__name__
        raise EscrowError(f"{file} holds {kind}: the escrow certificate must have an RSA key of at least 3072 bits; "
                          "make one with `llmkeep keys escrow` on a machine that stays offline")  # fmt: skip
    if usage and not usage[0].key_encipherment:
        raise EscrowError(f"{file} may not be used to encrypt keys (its keyUsage lacks keyEncipherment): "
                          f"give the {CERTIFICATE} that `llmkeep keys escrow` made")  # fmt: skip
    if not certificate.not_valid_before_utc <= moment < certificate.not_valid_after_utc:
        raise EscrowError(f"{file} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
                          f"{certificate.not_valid_after_utc:%Y-%m-%d}, and it is {moment:%Y-%m-%d}: correct the clock if "
                          "it is wrong, or make another certificate with `llmkeep keys escrow`")  # fmt: skip
    return certificate


def encrypt_to(certificate: Path, secret: bytes) -> bytes:
    """SECRET as a CMS AuthEnvelopedData (PEM) that only the owner of the escrow key can open."""
    load(certificate)
    return program(
        ["openssl", "cms", "-encrypt", "-aes-256-gcm", "-binary", "-outform", "PEM", "-recip", str(certificate),
         "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"],
        secret,
    )  # fmt: skip


def decrypt(sealed: Path, key: Path, passphrase_file: Path | None) -> bytes:
    """What is encrypted in SEALED, by the escrow key. Its passphrase is asked for if it has one and no file is given."""
    with held(key, passphrase_file) as decrypted:
        return decrypted(sealed)


@contextmanager
def held(key: Path, passphrase_file: Path | None) -> Iterator[Callable[[Path], bytes]]:
    """The escrow key for as many files as the context decrypts: its passphrase is asked for once."""
    if b"ENCRYPTED" not in key.read_bytes():
        yield lambda sealed: _decrypted([], sealed, key)
        return
    with in_memory(passphrase.existing(passphrase_file, str(key)).encode()) as word:
        readable = ["openssl", "pkey", "-in", str(key), "-noout", "-passin", f"file:{word}"]
        if subprocess.run(readable, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            raise PassphraseError(
                f"the passphrase does not open {key}: nothing was done; run it again with the correct one"
            )
        yield lambda sealed: _decrypted(["-passin", f"file:{word}"], sealed, key)


def _decrypted(words: list[str], sealed: Path, key: Path) -> bytes:
    argv = ["openssl", "cms", "-decrypt", "-binary", "-inform", "PEM", "-inkey", str(key), "-in", str(sealed)]
    try:
        return program([*argv, *words], b"")
    except SealError as error:
        sealed.stat()  # another message where it is not there
        raise EscrowError(
            f"{key} does not open {sealed}: use the escrow key that the bundle was made with"
        ) from error
