"""Findings of a scan that the versions in a bundle fix."""

from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.utils import canonicalize_name

from llmkeep.bundle import manifest
from llmkeep.bundle.cache import sha256
from llmkeep.errors import LlmkeepError
from llmkeep.vulnerabilities import estate, matching
from llmkeep.vulnerabilities.model import DEBIAN, NPM, PYPI, Component

INDEX = "/Packages"
WHEEL, SCRIPT = "pkg:pypi/", "pkg:npm/"


def offered(bundle: Path) -> dict[tuple[str, str], list[Component]]:
    """A bundle's versions, by ecosystem and name.

    Raises LlmkeepError if its index of packages differs from the signed one.
    """
    components: dict[tuple[str, str], list[Component]] = {}
    for component in _components(bundle):
        components.setdefault(_key(component.ecosystem, component.name), []).append(component)
    return components


def _key(ecosystem: str, name: str) -> tuple[str, str]:
    return ecosystem, canonicalize_name(name) if ecosystem == PYPI else name


def _components(bundle: Path) -> Iterator[Component]:
    for entry in manifest.read(bundle).files:
        for ecosystem, prefix in ((PYPI, WHEEL), (NPM, SCRIPT)):
            if entry.purl.startswith(prefix):
                name, _, version = unquote(entry.purl.removeprefix(prefix)).rpartition("@")
                yield Component(ecosystem, name, version)
        if entry.path.startswith("apt/dists/") and entry.path.endswith(INDEX):
            if sha256(bundle / entry.path) != entry.sha256:
                raise LlmkeepError(
                    f"{bundle / entry.path} differs from what was signed: copy the bundle again"
                )
            yield from packages((bundle / entry.path).read_text())


def packages(index: str) -> Iterator[Component]:
    """Components of an apt repository's Packages."""
    for stanza in index.strip().split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" ")
        )
        if "Package" in fields:
            name, version = fields["Package"], fields["Version"]
            source, _, own = fields.get("Source", name).partition(" ")
            yield Component(DEBIAN, name, version, source, own.strip("()") or version)


def close(document: dict[str, Any], bundle: Path, databases: Path, now: datetime) -> None:
    """Set `closed` of each finding if BUNDLE's versions fix it, according to the databases of the bundle DATABASES."""
    there, (_, by_ecosystem, _) = offered(bundle), estate.opened(databases, now, document["days"])
    document["fixed_by_serial"] = manifest.read(bundle).serial

    @cache
    def holes(ecosystem: str, name: str, release: str) -> frozenset[str] | None:
        """Vulnerabilities of all the bundle's versions; None if it has none."""
        newer = there.get(_key(ecosystem, name))
        if not newer:
            return None
        scans = [matching.host([component], by_ecosystem, {}, release) for component in newer]
        return frozenset(each.id for scanned in scans for each in scanned.findings)

    for host in document["hosts"].values():
        for finding in host["findings"]:
            names = finding["packages"] if finding["ecosystem"] == DEBIAN else [finding["package"]]
            remaining = [holes(finding["ecosystem"], name, host["release"]) for name in names]
            finding["closed"] = all(ids is not None and finding["id"] not in ids for ids in remaining)
