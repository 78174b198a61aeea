"""Verify a policy bundle on the host that will use it: signature, contents, revision, expiry.

A bundle is OPA's: a tarball of Rego and JSON with `.manifest` and `.signatures.json`, a JWT (ES256, kid "policy") over
the hashes of all files. OPA hashes a JSON file by its canonical form, and `llmkeep policy build` writes that very form,
so here each hash is that of the bytes. Debian's Python knows no ES256, so openssl verifies and the rest is here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import posixpath
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

KEY_ID = "policy"
ROOTS = ["llm"]  # what a policy may say something about; OPA's own `system` is not its business
MOST_BYTES = 16 << 20
SECONDS = 30
SIGNATURES, MANIFEST, DATA = ".signatures.json", ".manifest", "data.json"
# The DER of every public key on P-256 begins so (RFC 5480), and is 91 bytes long.
P256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")


@dataclass(frozen=True)
class Policy:
    """The metadata of a bundle whose signature is valid. `files`: path to hexadecimal hash."""

    revision: int
    expires: datetime
    files: dict[str, str]


def opened(content: bytes, key: str) -> Policy:
    """The metadata of a bundle; Refused if it is incomplete, or not signed by KEY (PEM)."""
    files = unpacked(content)
    signed = signed_hashes(files.pop(SIGNATURES, None), key)
    actual = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if actual != signed:
        differ = sorted(set(actual.items()) ^ set(signed.items()))[0][0]
        raise Refused(
            f"{differ} of the policy bundle differs from what was signed: it was changed, added or removed after"
            " `llmkeep policy build`. Build it again on the control node"
        )
    return described(files)


def described(files: dict[str, bytes]) -> Policy:
    """The metadata of a bundle with these files, whose signature was verified; Refused if it is incomplete."""
    try:
        manifest, meta = json.loads(files[MANIFEST]), merged(files)["llm"]["meta"]
        revision, expires = int(meta["revision"]), datetime.fromisoformat(meta["expires"])
        named, roots = str(manifest["revision"]), manifest["roots"]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as problem:
        raise Refused(
            f"the policy bundle lacks what each has ({type(problem).__name__}: {problem}): data.llm.meta with"
            " revision and expires, .manifest with revision and roots. Build it with `llmkeep policy build`"
        ) from problem
    if named != str(revision) or roots != ROOTS or expires.tzinfo is None:
        raise Refused(
            f"the policy bundle says revision {named} and {revision}, roots {roots}, expires {meta['expires']};"
            f" the revisions must be equal, the roots {ROOTS}, and the time needs a zone. Build it with `llmkeep "
            "policy build`"
        )
    return Policy(revision, expires, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def unpacked(content: bytes) -> dict[str, bytes]:
    """The bundle's files by path."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as bundle:
            for member in bundle:
                name = posixpath.normpath(f"/{member.name}").lstrip("/")
                stream = bundle.extractfile(member) if member.isreg() else None
                if (
                    stream is None
                    or name in files
                    or sum(map(len, files.values())) + member.size > MOST_BYTES
                ):
                    raise Refused(
                        f"{member.name!r} in the policy bundle is not a file, is a duplicate, or makes it larger than"
                        f" {MOST_BYTES >> 20} MiB. Build it with `llmkeep policy build`"
                    )
                files[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise Refused(
            f"the policy bundle ({len(content)} bytes) cannot be unpacked: {problem}. Build it again on the control node"
        ) from problem
    return files


def signed_hashes(signatures: bytes | None, key: str) -> dict[str, str]:
    """The signed hashes by path; Refused unless the only signature is by KEY."""
    if signatures is None:
        raise Refused(
            f"the policy bundle has no {SIGNATURES}: it is unsigned, or was stripped. Build it with `llmkeep policy build`"
        )
    try:
        (token,) = json.loads(signatures)["signatures"]
        head, body, mark = token.split(".")
        header, payload, signature = json.loads(decoded(head)), json.loads(decoded(body)), decoded(mark)
        hashes = {item["name"]: item["hash"] for item in payload["files"]}
        kinds = {item["algorithm"] for item in payload["files"]}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as problem:
        raise Refused(
            f"{SIGNATURES} of the policy bundle is not a signature ({type(problem).__name__}: {problem})."
            " Build it with `llmkeep policy build`"
        ) from problem
    claims = (header.get("alg"), header.get("kid"), payload.get("scope", ""), sorted(kinds))
    if claims != ("ES256", KEY_ID, "", ["SHA-256"]):
        raise Refused(
            f"the policy bundle's signature has algorithm, key, scope and hashes {claims};"
            f" only ('ES256', {KEY_ID!r}, '', ['SHA-256']) counts. Build it with `llmkeep policy build`"
        )
    if not verified(f"{head}.{body}".encode(), signature, key):
        raise Refused(
            "the policy bundle's signature does not match the control node's key: it was changed, or signed by another"
            " key. Do not use it; find out who put it there, and build it again with `llmkeep policy build`"
        )
    return hashes


def decoded(text: str) -> bytes:
    """Base64url without padding."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def verified(message: bytes, signature: bytes, key: str) -> bool:
    """Is SIGNATURE (R and S, 32 bytes each: RFC 7518, 3.4) one of MESSAGE by KEY (PEM, on P-256)?"""
    lines = [line for line in key.strip().splitlines() if not line.startswith("-----")]
    try:
        der = base64.b64decode("".join(lines), validate=True)
    except binascii.Error:
        der = b""
    if len(der) != 91 or not der.startswith(P256):
        raise Refused(
            f"the policy key ({len(der)} bytes) is not a public key on P-256; make it with `llmkeep policy init`"
        )
    if len(signature) != 64:
        return False
    whole = der_integer(signature[:32]) + der_integer(signature[32:])
    with tempfile.TemporaryDirectory(prefix="llmkeep-policy-") as folder:
        public, mark = Path(folder, "key"), Path(folder, "signature")
        public.write_text(key)
        mark.write_bytes(bytes([0x30, len(whole)]) + whole)
        argv = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(mark)]
        try:
            done = subprocess.run(argv, input=message, capture_output=True, timeout=SECONDS, check=False)
        except FileNotFoundError:
            raise Refused("openssl is not on this host; the role pki installs it") from None
    return done.returncode == 0


def der_integer(number: bytes) -> bytes:
    """A positive INTEGER of DER."""
    short = number.lstrip(b"\0")
    if not short or short[0] > 127:
        short = b"\0" + short
    return bytes([2, len(short)]) + short


def merged(files: dict[str, bytes]) -> dict[str, Any]:
    """The bundle's data: each data.json lies where its folder says."""
    data: dict[str, Any] = {}
    for name, content in sorted(files.items()):
        folder, base = posixpath.split(name)
        if base == DATA:
            place = data
            for part in [part for part in folder.split("/") if part]:
                place = place.setdefault(part, {})
            place.update(json.loads(content))
    return data
