"""Provenance of a bundle: an in-toto statement (SLSA v1) in a DSSE envelope, signed by the bundle's key.

The envelope is a file of the bundle; its subjects are all other files. The OpenPGP signature is over DSSE's
pre-authentication encoding, so `sqv` can check it (https://github.com/secure-systems-lab/dsse,
https://slsa.dev/spec/v1.0/provenance).
"""

import base64
import binascii
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmkeep.bundle import bill, manifest, signing
from llmkeep.bundle.lock import Artifact
from llmkeep.bundle.manifest import DAMAGED, UNSIGNED, BundleRefused, Entry

NAME = "provenance.json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD = "urn:llmkeep:bundle-build:v1"  # how external and internal parameters are to be read
SUBJECT = "files"  # what `sha256sum` prints of all files but this one, sorted by path


@dataclass(frozen=True)
class Build:
    """A build. `commit`: as in manifests, `git:…`; times as in manifests, UTC."""

    profile: str
    commit: str
    lock_sha256: str
    inputs_sha256: str
    signer: str
    begun: str
    ended: str


def statement(build: Build, entries: Iterable[Entry], artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """The statement about files with these ENTRIES, built from ARTIFACTS of the lock."""
    commit, _, dirty = build.commit.removeprefix("git:").partition("-")
    tree = {"uri": "git+urn:llmkeep:tree", "digest": {"gitCommit": commit}}
    if dirty:
        tree["annotations"] = {"changed": True}
    materials = [
        {"uri": each.purl, "name": name, "digest": {"sha256": each.sha256}}
        for name, each in sorted(artifacts.items())
    ]
    return {
        "_type": STATEMENT,
        "subject": [{"name": SUBJECT, "digest": {"sha256": bill.sums(entries)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {"profile": build.profile},
                "internalParameters": {
                    "lock_sha256": build.lock_sha256,
                    "inputs_sha256": build.inputs_sha256,
                },
                "resolvedDependencies": [tree, *materials],
            },
            "runDetails": {
                "builder": {
                    "id": f"urn:llmkeep:builder:{build.signer}",
                    "version": {"llmkeep": version("llmkeep")},
                },
                "metadata": {"startedOn": build.begun, "finishedOn": build.ended},
            },
        },
    }


def envelope(made: Mapping[str, Any], key: signing.Signer, signer: str) -> bytes:
    """The statement in its envelope, signed. SIGNER: the key's fingerprint."""
    payload = json.dumps(made, indent=1, sort_keys=True).encode()
    with tempfile.TemporaryDirectory(prefix="llmkeep-") as folder:
        file, signature = Path(folder, "encoded"), Path(folder, "signature")
        file.write_bytes(encoded(payload))
        signing.sign(key, file, signature)
        signatures = [{"keyid": signer, "sig": base64.b64encode(signature.read_bytes()).decode()}]
    document = {
        "payloadType": PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": signatures,
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a payload, over which the signature is made."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def verified(folder: Path, keyring: Path) -> dict[str, Any]:
    """A bundle's statement; BundleRefused unless a key in the keyring signed both, and the statement is about this bundle."""
    listed = manifest.authentic(folder, keyring, manifest.BUNDLE)
    path = folder / NAME
    if not path.is_file():
        raise BundleRefused(
            UNSIGNED, f"{folder} has no {NAME}: it was built by an earlier version; build it again"
        )
    try:
        document = json.loads(path.read_bytes())
        payload = base64.b64decode(document["payload"], validate=True)
        (signature,) = document["signatures"]
        content, kind = base64.b64decode(signature["sig"], validate=True), document["payloadType"]
        made: dict[str, Any] = dict(json.loads(payload))
        digests = [each["digest"]["sha256"] for each in made["subject"]]
        types = made["_type"], made["predicateType"]
    except (binascii.Error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleRefused(DAMAGED, f"{path} cannot be read ({error}): build the bundle again") from error
    try:
        signer = signing.verify(keyring, path, encoded(payload), content)
    except signing.SignatureRefused as error:
        raise BundleRefused(UNSIGNED, str(error)) from error
    if (kind, *types) != (PAYLOAD, STATEMENT, PREDICATE):
        raise BundleRefused(UNSIGNED, f"{path} is signed as {', '.join(map(str, types))}, not as provenance")
    subject = bill.sums(entry for entry in listed.files if entry.path != NAME)
    if signer != listed.signer or digests != [subject]:
        raise BundleRefused(
            UNSIGNED,
            f"{path} is signed by {signer} for files with {digests}, but the bundle is signed by {listed.signer} "
            f"and has {subject}: it belongs to another bundle",
        )
    return made
