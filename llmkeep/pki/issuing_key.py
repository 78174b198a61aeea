"""The issuing CA's key in an HSM, which it never leaves.

Its token and PIN differ from those of the volumes, whose PIN every host that opens volumes knows.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from llmkeep import hsm
from llmkeep.durable import require_format
from llmkeep.sealing import SealError

PIN = "llmkeep.issuing-pin"
PROOF = b"llmkeep: this key signs"


def _use(
    settings: dict[str, Any], data: bytes, make: bool = False
) -> tuple[ec.EllipticCurvePublicKey, bytes]:
    """The public key in the token, and its signature of DATA in the encoding of certificates.

    A run signs for many hosts at once, but the library's PIN rules admit one login at a time.
    """
    signatures = hsm.pkcs11_signatures()
    try:
        answer = signatures.use(settings, hashlib.sha384(data).digest(), make)
    except signatures.Fault as fault:
        raise SealError(
            f"the issuing key in the HSM: {fault} ({fault.kind}, see docs/operate/certificates.md)"
        ) from fault
    raw = bytes.fromhex(answer["signature"])
    r, s = (int.from_bytes(half, "big") for half in (raw[: len(raw) // 2], raw[len(raw) // 2 :]))
    public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), bytes.fromhex(answer["public"]))
    return public, encode_dss_signature(r, s)


class HsmKey(ec.EllipticCurvePrivateKey):
    """A `cryptography` private key that can only sign, with one login per signature."""

    def __init__(self, settings: dict[str, Any], public: ec.EllipticCurvePublicKey) -> None:
        self._settings, self._public = settings, public

    @classmethod
    def standing(cls, settings: Path, public: ec.EllipticCurvePublicKey) -> "HsmKey":
        """The key named in a settings file. Whether it matches PUBLIC is checked when it signs.

        SealError if the file cannot be read, LlmkeepError if a newer llmkeep wrote it.
        """
        try:
            document = json.loads(settings.read_bytes())
        except ValueError as error:
            raise SealError(
                f"{settings} cannot be read ({error}): restore it from a backup of this host"
            ) from error
        require_format(settings, document)
        return cls({name: value for name, value in document.items() if name != "format"}, public)

    @classmethod
    def made(cls, settings: dict[str, Any]) -> "HsmKey":
        """The key in the token, or a new one."""
        return cls(settings, _use(settings, PROOF, make=True)[0])

    def prove(self) -> None:
        """Raise SealError unless the HSM signs with this key."""
        self.sign(PROOF, ec.ECDSA(hashes.SHA384()))

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        if not isinstance(signature_algorithm.algorithm, hashes.SHA384):
            raise NotImplementedError("an issuing key on P-384 can only sign SHA-384")
        _, signature = _use(self._settings, bytes(data))
        try:
            self._public.verify(signature, bytes(data), signature_algorithm)
        except InvalidSignature:
            raise SealError(
                f"the key {self._settings['label']} in the token {self._settings['token']} does not match the issuing "
                "certificate: restore the token from the HSM's backup, or complete `llmkeep issuing adopt`"
            ) from None
        return signature

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    # The rest of the interface, which `cryptography` never calls of an authority, and a key in an HSM has no answer to.
    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        raise NotImplementedError("the issuing key can only sign")

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        raise NotImplementedError("the issuing key never leaves the HSM")

    def private_bytes(self, *_: object) -> bytes:
        raise NotImplementedError("the issuing key never leaves the HSM")

    def __copy__(self) -> "HsmKey":
        return self

    def __deepcopy__(self, _: object) -> "HsmKey":
        return self
