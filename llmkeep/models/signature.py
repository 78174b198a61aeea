"""Read and make signatures of models in the format of OpenSSF's model signing (OMS), with a key.

The format is of model-signing 1.x (https://github.com/sigstore/model-transparency): a bundle of Sigstore's with a
DSSE envelope around an in-toto statement. Signatures by certificates and by identities (Sigstore, Rekor) need roots
and a log that are unavailable behind an air gap: they are refused.
"""

import base64
import binascii
import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmkeep.bundle.cache import sha256
from llmkeep.bundle.manifest import SHA256
from llmkeep.errors import printable
from llmkeep.models import contents
from llmkeep.models.refusal import DAMAGED, UNFIT, ModelRefused

NAME = "model.sig"  # beside the files
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
MOST = 64 << 20  # bytes of a signature


@dataclass(frozen=True)
class Signature:
    """The signed statement. `files`: SHA-256 by path; `key`: SHA-256 of the maker's public key in PEM, as OMS names it."""

    name: str
    files: dict[str, str]
    key: str
    sha256: str

    def require_whole(self, paths: set[str]) -> None:
        """ModelRefused if a signed file is missing: without its configuration, a model behaves differently."""
        for path in sorted(self.files.keys() - paths):
            if contents.is_text(path) or contents.TENSORS.fullmatch(path):
                raise ModelRefused(
                    DAMAGED,
                    f"{printable(path)} is missing, although its maker signed it: download the model again",
                )

    def require(self, digests: dict[str, str]) -> None:
        """ModelRefused unless the maker signed all these files, by path and SHA-256."""
        for path, digest in digests.items():
            if self.files.get(path) != digest:
                signed = self.files.get(path, "nothing of that name")
                raise ModelRefused(
                    DAMAGED,
                    f"{path} has sha256 {digest}, but its maker signed {signed}: download the model again from its maker",
                )


def read(file: Path, key: Path) -> Signature:
    """The signature in FILE; ModelRefused unless the owner of the public KEY (PEM, on a NIST curve) made it."""
    public = _public(key)
    own = _name(public)
    if not file.is_file() or file.stat().st_size > MOST:
        raise ModelRefused(
            DAMAGED, f"{file} is not a signature: give the file that the model's maker published"
        )
    content = file.read_bytes()
    try:
        document = json.loads(content)
        hint = document["verificationMaterial"].get("publicKey", {}).get("hint")
        envelope = document["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = (base64.b64decode(each["sig"], validate=True) for each in envelope["signatures"])
        kind = str(envelope["payloadType"])
    except (binascii.Error, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelRefused(
            DAMAGED, f"{file} is not a signature of model signing ({error}): download it again"
        ) from error
    if hint != own:
        raise ModelRefused(
            DAMAGED,
            f"{file} was made with the key {str(hint)[:80]}, but {key} is {own}: give its maker's key",
        )
    try:
        public.verify(signature, _encoded(kind, payload), ec.ECDSA(HASHES[public.curve.name]))
    except InvalidSignature as error:
        raise ModelRefused(DAMAGED, f"{file} was not signed by {key}: do not use the model") from error
    try:
        name, files = _files(json.loads(payload), kind)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelRefused(UNFIT, f"{file} is signed, but its statement is unusable ({error})") from error
    return Signature(name, files, own, hashlib.sha256(content).hexdigest())


def make(folder: Path, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The signature of a model's FOLDER with all of its files, which are read; ModelRefused if it contains a link or a pipe."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        mode, name = path.lstat().st_mode, path.relative_to(folder).as_posix()
        if stat.S_ISREG(mode):
            digests[name] = sha256(path)
        elif not stat.S_ISDIR(mode):
            raise ModelRefused(
                UNFIT,
                f"{printable(name)} is not a regular file, and a signature covers only these: remove it",
            )
    if not digests:
        raise ModelRefused(UNFIT, f"{folder} has no files: give the folder of a model")
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": folder.resolve().name, "digest": {"sha256": _root(digests)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [
                {"name": name, "digest": digest, "algorithm": "sha256"} for name, digest in digests.items()
            ],
        },
    }
    payload = json.dumps(statement).encode()
    raw = key.sign(_encoded(PAYLOAD, payload), ec.ECDSA(HASHES[key.curve.name]))
    document = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": _name(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD,
            "signatures": [{"sig": base64.b64encode(raw).decode(), "keyid": ""}],
        },
    }
    return json.dumps(document).encode() + b"\n"


def private(key: Path, password: str | None) -> ec.EllipticCurvePrivateKey:
    """The private KEY in a PEM file; ModelRefused for a key that model signing does not support or that does not open."""
    try:
        secret = serialization.load_pem_private_key(key.read_bytes(), password.encode() if password else None)
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise ModelRefused(UNFIT, f"{key} does not open as a private key in PEM ({error})") from error
    if not isinstance(secret, ec.EllipticCurvePrivateKey) or secret.curve.name not in HASHES:
        raise ModelRefused(
            UNFIT, f"{key} is not supported by model signing: it must be on {', '.join(HASHES)}"
        )
    return secret


def _encoded(kind: str, payload: bytes) -> bytes:
    """The bytes over which DSSE makes the signature."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def _name(key: ec.EllipticCurvePublicKey) -> str:
    """How OMS names a key."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _root(files: dict[str, str]) -> str:
    """The digest that stands for all of these files."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values())).hexdigest()


def _public(key: Path) -> ec.EllipticCurvePublicKey:
    try:
        public = serialization.load_pem_public_key(key.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ModelRefused(UNFIT, f"{key} is not a public key in PEM ({error}): give the maker's") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in HASHES:
        raise ModelRefused(
            UNFIT, f"{key} is not supported by model signing: it must be on {', '.join(HASHES)}"
        )
    return public


def _files(statement: dict[str, Any], kind: str) -> tuple[str, dict[str, str]]:
    """Name and files of a statement; ValueError for one of another kind, or that contradicts itself."""
    types = kind, statement["_type"], statement["predicateType"]
    how, resources = statement["predicate"]["serialization"], statement["predicate"]["resources"]
    (subject,) = statement["subject"]
    if types != (PAYLOAD, STATEMENT, PREDICATE) or (how["method"], how["hash_type"]) != ("files", "sha256"):
        raise ValueError(f"it is {types} by {how}, but files by sha256 are needed")
    files = {each["name"]: each["digest"] for each in resources if each["algorithm"] == "sha256"}
    if len(files) != len(resources) or not all(SHA256.fullmatch(digest) for digest in files.values()):
        raise ValueError("a file is listed twice, or without sha256")
    root = _root(files)
    if subject["digest"]["sha256"] != root:
        raise ValueError(f"its root is {subject['digest']['sha256']}, but that of its files is {root}")
    return str(subject["name"]), files
