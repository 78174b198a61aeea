"""`llmkeep bundle compare`: check that two bundles, built by two teams, have the same content.

Signatures, keys and dates differ between teams. Everything else is content, and each difference in it is printed.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from llmkeep.bundle import manifest, provenance
from llmkeep.bundle.manifest import Manifest

KEYS = ("escrow.pem", "keyring.pgp", provenance.NAME)
BOOTSTRAP, INDEX = "bootstrap", re.compile(r"apt/dists/.+/(?:In)?Release")
DATED = re.compile(rb"^(?:Date|Valid-Until|Hash): .*\n", re.MULTILINE)
SIGNATURE = re.compile(rb"-----BEGIN PGP SIGNATURE-----.*", re.DOTALL)


def read(folder: Path) -> Manifest:
    """A bundle's manifest; BundleRefused unless every byte matches the manifest. `bundle verify` checks the signature."""
    listed = manifest.read(folder)
    manifest.check(folder, listed.files, {manifest.NAME, manifest.SIGNATURE})
    return listed


def differences(first: Path, second: Path) -> Iterator[str]:
    """One sentence per difference in content; empty if there is none."""
    manifests = read(first), read(second)
    one, other = ({entry.path: entry for entry in each.files} for each in manifests)
    if manifests[0].profile != manifests[1].profile:
        yield f"profile {manifests[0].profile} in {first}, {manifests[1].profile} in {second}"
    for path in sorted(one.keys() | other.keys()):
        if path not in other:
            yield f"{path}: only in {first}"
        elif path not in one:
            yield f"{path}: only in {second}"
        elif one[path].sha256 != other[path].sha256 and path not in KEYS:
            contents = [
                content(folder / path, path, each.signer)
                for folder, each in zip((first, second), manifests, strict=True)
            ]
            if contents[0] is None or contents[0] != contents[1]:
                yield f"{path}: sha256 {one[path].sha256} in {first}, {other[path].sha256} in {second}"
        elif one[path].licence != other[path].licence or one[path].purl != other[path].purl:
            yield f"{path}: {one[path].purl} {one[path].licence} in {first}, {other[path].purl} {other[path].licence} in {second}"


def content(file: Path, path: str, signer: str) -> bytes | None:
    """A file's content without the signer's fingerprint, dates and signatures; None for a file that has none of these."""
    if path == BOOTSTRAP:
        return file.read_bytes().replace(signer.encode(), b"SIGNER")
    if INDEX.fullmatch(path):
        return DATED.sub(b"", SIGNATURE.sub(b"", file.read_bytes()))
    return None
