"""A signed policy bundle (OPA's format, tar.gz), verified before anything in it is used.

OPA hashes a JSON file by its canonical form. The bundles that llmkeep makes hold that very form, so here a
file's hash is that of its bytes, whatever it is.
"""

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jwt

KEY_ID = "policy"
ALGORITHM = "ES256"
MANIFEST, SIGNATURES = ".manifest", ".signatures.json"
LIMIT = 16 * 1024 * 1024  # bytes, unpacked
TIME = "%Y-%m-%dT%H:%M:%SZ"
SAFE_PATH = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*/([a-z0-9_]+\.rego|data\.json)")

# Exit codes of `llmkeep policy verify`; those of `llmkeep bundle verify` mean the same.
UNSIGNED, DAMAGED, REPLAYED, EXPIRED = 3, 4, 5, 6


class PolicyRefused(Exception):
    """The bundle must not be used. `code`: which of the four reasons."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Policy:
    """The content of a bundle: Rego modules by path, and the document `data`."""

    revision: int
    expires: datetime
    modules: dict[str, str]
    data: dict[str, Any]


def judged(packed: bytes, key: bytes, minimum: int = 0, now: datetime | None = None) -> Policy:
    """The bundle's policy; raises PolicyRefused unless all of it is as signed by KEY (PEM, public), and in date.

    `minimum` is the highest revision accepted so far.
    """
    files = unpacked(packed)
    signed = _signed(files.pop(SIGNATURES, None), key)
    if lacking := sorted(signed.keys() - files.keys()):
        raise PolicyRefused(DAMAGED, f"{lacking[0]} is missing: fetch the bundle again")
    for name, content in sorted(files.items()):
        if name not in signed:
            raise PolicyRefused(DAMAGED, f"{name} was not signed: fetch the bundle again")
        if (digest := hashlib.sha256(content).hexdigest()) != signed[name]:
            raise PolicyRefused(
                DAMAGED, f"{name} has sha256 {digest}, but {signed[name]} was signed: fetch the bundle again"
            )
    policy = parsed(files)
    if policy.revision < minimum:
        raise PolicyRefused(
            REPLAYED,
            f"revision {policy.revision} is older than {minimum}, which was accepted before: "
            "use one of that revision or a later one",
        )
    moment = now or datetime.now(UTC)
    if moment >= policy.expires:
        raise PolicyRefused(
            EXPIRED,
            f"it expired at {policy.expires.strftime(TIME)} and the clock says {moment.strftime(TIME)}: set the clock, or "
            "build the policy again",
        )
    return policy


def unpacked(packed: bytes) -> dict[str, bytes]:
    """The tar's files by name, unverified."""
    files: dict[str, bytes] = {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            content = stream.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise PolicyRefused(
                DAMAGED, f"it has more than {LIMIT} bytes unpacked, which is too large for a policy"
            )
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if not file or member.name in files:
                    raise PolicyRefused(DAMAGED, f"{member.name} is a duplicate, or not a plain file")
                files[member.name] = file.read()
    except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
        raise PolicyRefused(
            DAMAGED, f"it is not a bundle, or is truncated ({error}): fetch it again"
        ) from error
    return files


def parsed(files: dict[str, bytes]) -> Policy:
    """Modules and data of a bundle's files (without the signature), unverified."""
    modules: dict[str, str] = {}
    data: dict[str, Any] = {}
    try:
        for name, content in files.items():
            if name == MANIFEST:
                continue
            if not SAFE_PATH.fullmatch(name):
                raise PolicyRefused(DAMAGED, f"{name!r} does not belong in a policy")
            if name.endswith(".rego"):
                modules[name] = content.decode()
                continue
            *folders, last = name.split("/")[:-1]
            place = data
            for folder in folders:
                place = place.setdefault(folder, {})
            if last in place:
                raise PolicyRefused(DAMAGED, f"{name} repeats content of another file")
            place[last] = json.loads(content)
        meta, manifest = data["llm"]["meta"], json.loads(files[MANIFEST])
        expires = datetime.strptime(meta["expires"], TIME).replace(tzinfo=UTC)
        if manifest["revision"] != str(meta["revision"]) or manifest["roots"] != ["llm"]:
            raise PolicyRefused(DAMAGED, f"{MANIFEST} and llm/meta/data.json do not agree")
        return Policy(int(meta["revision"]), expires, modules, data)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PolicyRefused(
            DAMAGED, f"it is not a policy of llmkeep ({type(error).__name__}: {error})"
        ) from error


def _signed(signatures: bytes | None, key: bytes) -> dict[str, str]:
    """File names to the sha256 that the owner of KEY signed."""
    if signatures is None:
        raise PolicyRefused(UNSIGNED, f"it has no {SIGNATURES}: an unsigned policy is not used")
    try:
        (token,) = json.loads(signatures)["signatures"]
        if jwt.get_unverified_header(token).get("kid") != KEY_ID:
            raise PolicyRefused(UNSIGNED, f"its signature is not for the key {KEY_ID!r}")
        claims = jwt.decode(token, key, algorithms=[ALGORITHM])
        return {file["name"]: file["hash"] for file in claims["files"] if file["algorithm"] == "SHA-256"}
    except (KeyError, TypeError, ValueError, RecursionError, jwt.PyJWTError) as error:
        raise PolicyRefused(
            UNSIGNED,
            f"it is not signed by the key of this estate ({error or type(error).__name__}): do not use it",
        ) from error
