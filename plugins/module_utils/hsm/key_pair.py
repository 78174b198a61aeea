"""A host's key pair in one token, in a session that is logged in: found, generated, read back, and proven."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pkcs11

# SubjectPublicKeyInfo of a point on P-384, up to the point.
P_384_HEAD = bytes.fromhex("3076301006072a8648ce3d020106052b81040022036200")
POINT, SECRET, SIGNATURE = 97, 48, 96
RSA_BITS = 3072


class Fault(Exception):
    """The key cannot be used; `kind` names the fault, the message says what was seen and what to do."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Settings:
    """Where the key is."""

    module: str
    tokens: list[str]
    label: str
    type: str = "ec"
    address: str = ""  # of p11-kit-client.so, as unix:path=SOCKET
    seconds: int = 20
    record: str = ""
    user: str = ""  # whose the module's files are, where it has files
    signs: bool = False  # a key of an authority or of a server, which signs and opens nothing


def the_pair(session: Any, token: Any, settings: Settings) -> tuple[int, int] | None:
    """The handles of the public and the private key; None where there is neither."""
    named = {pkcs11.LABEL: settings.label.encode()}
    publics = session.find({pkcs11.CLASS: pkcs11.PUBLIC_KEY, **named})
    privates = session.find({pkcs11.CLASS: pkcs11.PRIVATE_KEY, **named})
    if not publics and not privates:
        return None
    if len(publics) > 1 or len(privates) > 1:
        raise Fault(
            "two_keys",
            f"the token {token.label} has {len(privates)} private and {len(publics)} public keys called"
            f" {settings.label}, so which one opens is not known. Give those that open nothing another label",
        )
    if not publics or not privates:
        half = "private" if publics else "public"
        raise Fault(
            "key_missing",
            f"the {half} half of the key {settings.label} is missing in the token {token.label}. Restore it from the"
            " HSM's backup; if nothing was ever enrolled with it, remove the other half and run again",
        )
    return publics[0], privates[0]


def generate(session: Any, settings: Settings) -> None:
    shared = {
        pkcs11.TOKEN: True,
        pkcs11.LABEL: settings.label.encode(),
        pkcs11.ID: pkcs11.new_id(),
    }
    only = {pkcs11.SIGN: settings.signs, pkcs11.UNWRAP: False}
    private = {**shared, pkcs11.PRIVATE: True, pkcs11.SENSITIVE: True, pkcs11.EXTRACTABLE: False, **only}
    public = {**shared, pkcs11.PRIVATE: False}
    if settings.type == "ec":
        session.generate(
            pkcs11.EC_KEY_PAIR_GEN,
            {**public, pkcs11.EC_PARAMS: pkcs11.P_384},
            {**private, pkcs11.DERIVE: not settings.signs, pkcs11.DECRYPT: False},
        )
    else:
        session.generate(
            pkcs11.RSA_KEY_PAIR_GEN,
            {
                **public,
                pkcs11.ENCRYPT: True,
                pkcs11.MODULUS_BITS: RSA_BITS,
                pkcs11.PUBLIC_EXPONENT: b"\1\0\1",
            },
            {**private, pkcs11.DECRYPT: True},
        )


def described(
    session: Any, key: tuple[int, int], token: Any, settings: Settings, known: dict[str, Any] | None
) -> dict[str, Any]:
    """The key's attributes, read back from the token; Fault if one is not as required."""
    public, private = key
    number = int.from_bytes(session.read(private, pkcs11.KEY_TYPE), sys.byteorder)
    kind = {pkcs11.EC: "ec", pkcs11.RSA: "rsa"}.get(number, str(number))
    use = pkcs11.SIGN if settings.signs else pkcs11.DERIVE if kind == "ec" else pkcs11.DECRYPT
    facts: dict[str, Any] = {
        "type": kind,
        "sensitive": session.is_set(private, pkcs11.SENSITIVE),
        "always_sensitive": session.is_set(private, pkcs11.ALWAYS_SENSITIVE),
        "never_extractable": session.is_set(private, pkcs11.NEVER_EXTRACTABLE)
        and not session.is_set(private, pkcs11.EXTRACTABLE),
        "local": session.is_set(private, pkcs11.LOCAL),
        "usable": session.is_set(private, use),
    }
    lacking = [name for name, value in facts.items() if value is False]
    if kind != settings.type:
        lacking.append(f"type {settings.type}: it is {kind}")
    elif kind == "ec" and session.read(public, pkcs11.EC_PARAMS) != pkcs11.P_384:
        lacking.append("the curve P-384")
    if lacking:
        raise Fault(
            "key_weak",
            f"the key {settings.label} in the token {token.label} is not {', not '.join(lacking)}. It was not made in"
            " the token by llmkeep and may exist elsewhere: it is not used. Give it another label",
        )
    shown = public_part(session, public, kind)
    facts["public"] = shown.hex()
    facts["public_sha256"] = hashlib.sha256(shown).hexdigest()
    if settings.signs:
        facts["public_pem"] = pem(shown)
    if known and known["public_sha256"] != facts["public_sha256"]:
        raise Fault(
            "key_missing",
            f"the key {settings.label} in the token {token.label} differs from the previous one (public part"
            f" {facts['public_sha256'][:12]}, was {known['public_sha256'][:12]}). Restore the old one from the HSM's"
            f" backup, or remove the token from {settings.record}, run again, and enrol the new key",
        )
    return facts


def public_part(session: Any, public: int, kind: str) -> bytes:
    """The point, without the DER around it that most modules give, or the modulus."""
    if kind == "ec":
        return bytes(session.read(public, pkcs11.EC_POINT)[-POINT:])
    return bytes(session.read(public, pkcs11.MODULUS))


def pem(point: bytes) -> str:
    """A public key on P-384 as openssl takes it."""
    body = base64.encodebytes(P_384_HEAD + point).decode().replace("\n", "")
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----"])


def prove(session: Any, key: tuple[int, int], facts: dict[str, Any], token: Any, settings: Settings) -> None:
    """Prove that the key is usable: use it for its purpose and compare the result with openssl's."""
    public = bytes.fromhex(facts["public"])
    try:
        if settings.signs:
            expected = digest = os.urandom(SECRET)
            signed = session.sign(key[1], digest, SIGNATURE)
            got = digest if is_signed(facts["public_pem"], digest, signed) else b""
        elif facts["type"] == "ec":
            point, expected = exchanged(public)
            got = session.derive(key[1], point, SECRET)
        else:
            expected = os.urandom(SECRET)
            exponent = int.from_bytes(session.read(key[0], pkcs11.PUBLIC_EXPONENT), "big")
            got = session.decrypt(key[1], enclosed(expected, public, exponent))
    except pkcs11.Error as problem:
        if problem.gone:
            raise
        raise Fault(
            "does_not_open",
            f"the key {settings.label} of the token {token.label} is found by {settings.module}, but not used:"
            f" {problem}. By this way a volume could be enrolled and never be opened, so it is refused. Reach the"
            " HSM by its vendor's module, or by p11-kit",
        ) from problem
    if got != expected:
        raise Fault(
            "does_not_open",
            f"{settings.module} answers for the key {settings.label} of the token {token.label} with another secret"
            " or signature than the key gives. Nothing would ever be opened or served by it, so it is refused",
        )


def is_signed(public: str, digest: bytes, signature: bytes) -> bool:
    """Whether (r, s) is a signature of the digest."""
    numbers = b""
    for half in signature[: SIGNATURE // 2], signature[SIGNATURE // 2 :]:
        number = half.lstrip(b"\0")
        number = b"\0" + number if number[:1] >= b"\x80" else number
        numbers += bytes([2, len(number)]) + number
    with tempfile.NamedTemporaryFile() as key, tempfile.NamedTemporaryFile() as signed:
        key.write(public.encode())
        signed.write(bytes([0x30, len(numbers)]) + numbers)
        key.flush()
        signed.flush()
        try:
            openssl("pkeyutl", "-verify", "-pubin", "-inkey", key.name, "-sigfile", signed.name, stdin=digest)
        except OSError:
            return False
    return True


def openssl(*words: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *words], input=stdin, capture_output=True, timeout=30, check=False)
    if done.returncode != 0:
        raise OSError(f"openssl {words[0]} ended with {done.returncode}: {done.stderr.decode().strip()}")
    return done.stdout


def exchanged(public: bytes) -> tuple[bytes, bytes]:
    """The point of an ephemeral key, and the secret that it shares with the public key."""
    own = openssl("genpkey", "-quiet", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")
    point = openssl("pkey", "-pubout", "-outform", "DER", stdin=own)[-POINT:]
    with tempfile.NamedTemporaryFile() as peer:
        peer.write(P_384_HEAD + public)
        peer.flush()
        secret = openssl(
            "pkeyutl", "-derive", "-inkey", "/dev/stdin", "-peerkey", peer.name, "-peerform", "DER", stdin=own
        )
    return point, secret


def enclosed(secret: bytes, modulus: bytes, exponent: int) -> bytes:
    """A secret encrypted to an RSA key with PKCS#1 v1.5 padding."""
    size = len(modulus)
    padding = bytes(1 + byte % 255 for byte in os.urandom(size - 3 - len(secret)))
    block = b"\0\2" + padding + b"\0" + secret
    return pow(int.from_bytes(block, "big"), exponent, int.from_bytes(modulus, "big")).to_bytes(size, "big")
