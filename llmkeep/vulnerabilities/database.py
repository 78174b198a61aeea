"""Databases of vulnerabilities in a bundle's folder `vulnerabilities`: Debian's security tracker, and OSV's archives.

The signed manifest has the hash and date of each. Components covered by an unusable database are unknown.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from llmkeep.bundle import manifest
from llmkeep.bundle.cache import sha256
from llmkeep.bundle.databases import FILES, FOLDER
from llmkeep.bundle.manifest import Entry
from llmkeep.errors import LlmkeepError
from llmkeep.vulnerabilities.model import DEBIAN, ECOSYSTEMS, PYPI

DAYS = 30  # how old a database may be
LARGEST = 1 << 30  # bytes of one advisory's file, unpacked: more is no advisory
AHEAD = timedelta(hours=1)  # by which clocks differ


class Unusable(LlmkeepError):
    """A database is missing, damaged, empty or too old. The message names it, and what to do."""


@dataclass(frozen=True)
class Database:
    """Content of one file. `packages`: advisories by source package or distribution.

    For Debian, an advisory is the tracker's entry with its `id`; for OSV, it is a record.
    """

    ecosystem: str
    date: datetime
    sha256: str
    packages: dict[str, list[dict[str, Any]]]

    def advisories(self, name: str) -> list[dict[str, Any]]:
        """The advisories on a package."""
        return self.packages.get(canonicalize_name(name) if self.ecosystem == PYPI else name, [])

    def require_recent(self, now: datetime, days: int) -> None:
        """Raise Unusable for a database older than DAYS, or from the future."""
        if self.date > now + AHEAD:
            raise Unusable(f"the database of {self.ecosystem} is of {self.date:%Y-%m-%d %H:%M}, and the clock says "
                           f"{now:%Y-%m-%d %H:%M}: set the clock")  # fmt: skip
        if now - self.date > timedelta(days=days):
            raise Unusable(f"the database of {self.ecosystem} is of {self.date:%Y-%m-%d}, {(now - self.date).days} days old, "
                           f"and {days} is the limit: use a newer bundle")  # fmt: skip


def read(bundle: Path, ecosystem: str) -> Database:
    """The database of a bundle whose manifest was verified. Raises Unusable."""
    entry = entry_of(bundle, ecosystem)
    path = bundle / entry.path
    try:
        if (digest := sha256(path)) != entry.sha256:
            raise Unusable(
                f"{path} has sha256 {digest}, but {entry.sha256} was signed: run bootstrap from the medium again"
            )
        return parse(ecosystem, path.read_bytes(), date_of(entry), digest)
    except OSError as error:
        raise Unusable(
            f"{path} cannot be read ({error.strerror}): run bootstrap from the medium again"
        ) from error


def entry_of(bundle: Path, ecosystem: str) -> Entry:
    """The manifest's entry of a database. Raises Unusable if the bundle has none."""
    path = f"{FOLDER}/{FILES[ecosystem]}"
    for entry in manifest.read(bundle).files:
        if entry.path == path:
            return entry
    raise Unusable(f"{bundle} has no database of {ecosystem}: its builder did not reach the source; see "
                   "docs/audit/vulnerabilities.md")  # fmt: skip


def date_of(entry: Entry) -> datetime:
    """The time of a database's state: the version in its package URL. Raises Unusable."""
    try:
        return datetime.strptime(entry.purl.rpartition("@")[2], manifest.TIME).replace(tzinfo=UTC)
    except ValueError as error:
        raise Unusable(
            f"{entry.path} has no date in its package URL {entry.purl!r}: build the bundle again"
        ) from error


def parse(ecosystem: str, content: bytes, date: datetime, digest: str) -> Database:
    """Parse a database. Raises Unusable if it is invalid or has no advisory."""
    try:
        packages = tracker(json.loads(content)) if ecosystem == DEBIAN else osv(ecosystem, content)
    except (
        AttributeError,
        KeyError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise Unusable(
            f"the database of {ecosystem} cannot be read ({type(error).__name__}: {error}): build the bundle again"
        ) from error
    if not any(packages.values()):
        raise Unusable(f"the database of {ecosystem} is empty: build the bundle again")
    return Database(ecosystem, date, digest, packages)


def tracker(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Entries of Debian's tracker by source package. Raises ValueError and the like for another document."""
    packages = {}
    for source, entries in document.items():
        packages[source] = [
            {"id": name, "releases": {**entry["releases"]}} for name, entry in entries.items()
        ]
    return packages


def osv(ecosystem: str, archive: bytes) -> dict[str, list[dict[str, Any]]]:
    """Records by package; those that were withdrawn are left out."""
    packages: dict[str, list[dict[str, Any]]] = {}
    for record in records(archive):
        if record.get("withdrawn"):
            continue
        for affected in record["affected"]:
            if affected["package"]["ecosystem"].lower() != ecosystem:
                continue
            name = affected["package"]["name"]
            packages.setdefault(canonicalize_name(name) if ecosystem == PYPI else name, []).append(
                {**{key: record.get(key) for key in ("id", "aliases", "severity", "database_specific")}, "affected": affected}
            )  # fmt: skip
    return packages


def records(archive: bytes) -> Iterator[dict[str, Any]]:
    """All records of an archive of OSV."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        for member in packed.infolist():
            if member.file_size > LARGEST:
                raise ValueError(f"{member.filename[:80]!r} has {member.file_size} bytes")
            yield json.loads(packed.read(member))


def usable(bundle: Path, now: datetime, days: int) -> tuple[dict[str, Database], dict[str, str]]:
    """A bundle's databases, and reasons by ecosystem why one must not be relied on. An old database is in both."""
    databases, problems = {}, {}
    for ecosystem in ECOSYSTEMS:
        try:
            databases[ecosystem] = read(bundle, ecosystem)
            databases[ecosystem].require_recent(now, days)
        except LlmkeepError as error:
            problems[ecosystem] = str(error)
    return databases, problems
