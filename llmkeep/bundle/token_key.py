"""A signing key in a PKCS#11 token, which it never leaves: EC P-384, made there.

A wrong PIN is presented to the token only once, and no PIN at all while the token warns that the next failed login
may lock it.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from llmkeep import hsm
from llmkeep.bundle import openpgp
from llmkeep.errors import LlmkeepError
from llmkeep.passphrase import PassphraseError

PROOF = bytes(48)  # a digest that no content has


@dataclass(frozen=True)
class Token:
    """Location of the key. `user`: the account that may use the module, the current one if empty. `seconds`: time limit."""

    module: str
    token: str
    label: str
    user: str = ""
    seconds: int = 20


def made(token: Token, pin: str) -> openpgp.Key:
    """The token's key with this label, else a new one."""
    answer = _used(token, pin, PROOF, make=True)
    return _key(token, pin, bytes.fromhex(answer["public"]), int(time.time()))


def settings(token: Token, key: openpgp.Key) -> bytes:
    """Settings for `opened`; none of them is secret."""
    return (
        json.dumps({**asdict(token), "public": key.point.hex(), "created": key.created}, indent=1).encode()
        + b"\n"
    )


def named(file: Path) -> str:
    """The key's name for the PIN prompt."""
    try:
        return f"the token {json.loads(file.read_bytes())['token']} (its PIN)"
    except (ValueError, KeyError, TypeError) as error:
        raise LlmkeepError(f"{file} cannot be read ({error!r}): restore it from a backup") from error


def opened(file: Path, pin: str) -> openpgp.Key:
    """The key that a settings file names, after a test signature that proves PIN and key."""
    fields = json.loads(file.read_bytes())
    point, created = bytes.fromhex(fields.pop("public")), int(fields.pop("created"))
    key = _key(Token(**fields), pin, point, created)
    key.sign(PROOF)
    return key


def _key(token: Token, pin: str, point: bytes, created: int) -> openpgp.Key:
    public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)

    def sign(digest: bytes) -> tuple[int, int]:
        raw = bytes.fromhex(_used(token, pin, digest)["signature"])
        r, s = (int.from_bytes(half) for half in (raw[: len(raw) // 2], raw[len(raw) // 2 :]))
        try:
            public.verify(encode_dss_signature(r, s), digest, ec.ECDSA(Prehashed(hashes.SHA384())))
        except InvalidSignature:
            raise LlmkeepError(
                f"the key {token.label} in the token {token.token} is not the one that hosts trust: restore the token from "
                "the HSM's backup"
            ) from None
        return r, s

    return openpgp.Key(point, created, sign)


def _used(token: Token, pin: str, digest: bytes, make: bool = False) -> dict[str, Any]:
    signatures = hsm.pkcs11_signatures()
    try:
        answer: dict[str, Any] = signatures.use_with(
            pin.encode(), {**asdict(token), "address": ""}, digest, make
        )
    except signatures.Fault as fault:
        kind = PassphraseError if fault.kind == "pin_wrong" else LlmkeepError
        raise kind(f"the signing key in the HSM: {fault} ({fault.kind}, see docs/operate/hsm.md)") from fault
    return answer
