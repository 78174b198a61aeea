"""A bundle that has databases of vulnerabilities, and no more: its manifest is not signed."""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import advisories

from llmkeep.bundle import manifest
from llmkeep.bundle.manifest import Entry, Manifest

DATABASES = {
    "vulnerabilities/debian.json": advisories.tracker(),
    "vulnerabilities/pypi.zip": advisories.archive(advisories.JINJA, advisories.JINJA_AGAIN),
    "vulnerabilities/npm.zip": advisories.archive(advisories.MARKED),
}


def write(
    folder: Path,
    date: datetime,
    files: Mapping[str, bytes] = DATABASES,
    more: tuple[Entry, ...] = (),
    serial: int = 7,
) -> Path:
    """Fill FOLDER; its databases are of DATE."""
    entries = [*more]
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        entries.append(
            entry(path, hashlib.sha256(content).hexdigest(), f"pkg:generic/x@{date:%Y-%m-%dT%H:%M:%SZ}")
        )
    header = ("lab", "2099-01-01T00:00:00Z", "2100-01-01T00:00:00Z", "", "", "")
    manifest.write(folder, Manifest(manifest.BUNDLE, serial, *header, files=entries))
    return folder


def entry(path: str, sha256: str, purl: str, source: str = "generic") -> Entry:
    return Entry(path, 1, sha256, "application/octet-stream", "NOASSERTION", source, purl)
