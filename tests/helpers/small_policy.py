"""Small signed policy bundles, as `llmkeep policy build` makes them, and malformed ones."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from plugin_modules import load

policy = load("module_utils.bundle.policy")

REGO = """package llm.authz

default decision := {"allow": false, "reason": "nothing grants it", "rule": "default_deny", "revision": 0}

decision := {"allow": true, "reason": "granted", "rule": "roles/analyst", "revision": data.llm.meta.revision} if {
	input.action == "GET /generate"
	"analyst" in input.roles
}
"""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A policy key."""
    return ec.generate_private_key(ec.SECP256R1())


def public(key: ec.EllipticCurvePrivateKey) -> str:
    """Its public half, PEM."""
    encoding, kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, kind).decode()


def canonical(value: object) -> str:
    """The form of JSON that OPA hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def files(
    revision: int = 7, expires: str = "2099-01-01T00:00:00Z", rego: str = REGO, **more: str
) -> dict[str, bytes]:
    """A bundle's files; MORE has others by path."""
    manifest = {"revision": str(revision), "roots": ["llm"], "rego_version": 1}
    data = {"llm": {"meta": {"revision": revision, "expires": expires}}}
    found = {"llm/authz/authz.rego": rego, "data.json": canonical(data), ".manifest": canonical(manifest)}
    return {name: content.encode() for name, content in (found | more).items()}


def signatures(signed: dict[str, bytes], key: Any, header: dict[str, str], **claims: Any) -> bytes:
    """`.signatures.json` over these files."""
    listed = [
        {"name": name, "hash": sha256(content), "algorithm": "SHA-256"} for name, content in signed.items()
    ]
    algorithm = header.get("alg", "ES256")
    token = jwt.encode(
        {"files": listed, "keyid": "policy", **claims}, key, algorithm, {"kid": "policy", **header}
    )
    return json.dumps({"signatures": [token]}).encode()


def packed(content: dict[str, bytes], *again: tuple[str, bytes]) -> bytes:
    """The tarball; AGAIN are files that follow under names that it has already."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as bundle:
        for name, data in [*content.items(), *again]:
            member = tarfile.TarInfo(f"/{name}")
            member.size = len(data)
            bundle.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def signed(content: dict[str, bytes], key: Any, header: dict[str, str] | None = None, **claims: Any) -> bytes:
    """A whole bundle."""
    return packed({**content, ".signatures.json": signatures(content, key, header or {}, **claims)})


def write(folder: Path, bundle: bytes, key: str) -> None:
    """Lay it where the control node has it, below FOLDER."""
    for path, data in (
        ("etc/llmkeep/policy/policy.pem", key.encode()),
        ("var/lib/llmkeep/policy/bundle.tar.gz", bundle),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def base64_of(content: bytes) -> str:
    """As slurp gives it."""
    return base64.b64encode(content).decode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
