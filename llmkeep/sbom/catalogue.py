"""Contents of the estate's bundles and releases, looked up by components found on hosts."""

import hashlib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkeep import source_tree
from llmkeep.bundle import bill, lock, manifest
from llmkeep.bundle.manifest import BundleRefused, Entry, Manifest
from llmkeep.bundle.wheels import canonical
from llmkeep.places import Places

RELEASES, CONTROL = (
    "/opt/llmkeep/releases/",
    "/opt/llmkeep/control-",
)  # of role llm_serving and its kin; of bootstrap
DIGITS = 12  # of an environment's name


@dataclass(frozen=True)
class Carrier:
    """A bundle or a release on the control node. `name`: how components name it."""

    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Carried:
    """A carrier's file or model."""

    origin: str
    entry: Entry
    folder: Path


@dataclass
class Catalogue:
    """Carriers, with the bundle in use first: it is preferred for content that several carriers have."""

    carriers: list[Carrier]
    packages: dict[tuple[str, str, str], Carried] = field(default_factory=dict)
    wheels: dict[tuple[str, str], list[Carried]] = field(default_factory=dict)
    files: dict[str, Carried] = field(default_factory=dict)
    models: dict[str, Carried] = field(default_factory=dict)
    environments: dict[str, tuple[str, list[Carried]]] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for carrier in self.carriers:
            self._add(carrier)

    def _add(self, carrier: Carrier) -> None:
        from packageurl import PackageURL

        folders: dict[str, list[Entry]] = {}
        for entry in carrier.manifest.files:
            carried = Carried(carrier.name, entry, carrier.folder)
            if entry.path.startswith("apt/pool/"):
                purl = PackageURL.from_string(entry.purl)
                architecture = str((purl.qualifiers or {}).get("arch", ""))
                self.packages.setdefault((purl.name, purl.version or "", architecture), carried)
            elif entry.path.endswith(".whl"):
                self.wheels.setdefault(named(entry.path), []).append(carried)
            elif entry.path.startswith("bin/") or entry.purl.startswith("pkg:npm/"):
                self.files.setdefault(entry.sha256, carried)
            if entry.path.startswith(("models/", "wheels/")):
                folders.setdefault("/".join(entry.path.split("/")[:2]), []).append(entry)
        for folder, entries in folders.items():
            whole = Carried(carrier.name, entries[0], carrier.folder)
            if folder.startswith("models/"):
                self.models.setdefault(bill.sums(entries, f"{folder}/"), whole)
            else:
                wheels = [
                    Carried(carrier.name, each, carrier.folder)
                    for each in entries
                    if each.path.endswith(".whl")
                ]
                for place in places(folder, entries):
                    self.environments.setdefault(place, (folder, wheels))

    @cached_property
    def current(self) -> Carrier | None:
        """The bundle in use."""
        return self.carriers[0] if self.carriers else None

    @cached_property
    def roles(self) -> dict[str, list[str]]:
        """Packages, `name=version`, that roles install, by the lock of the bundle in use."""
        return lock.load(self.current.folder / "tree").roles if self.current else {}

    def record(self, wheel: Carried) -> str:
        """The `wheel_digest` (module_utils.bundle.components) of a wheel; empty if the file is not a wheel."""
        if wheel.entry.sha256 not in self.records:
            self.records[wheel.entry.sha256] = _record(wheel.folder / wheel.entry.path)
        return self.records[wheel.entry.sha256]


def _record(path: Path) -> str:
    components: Any = source_tree.plugin("module_utils.bundle.components")
    try:
        with zipfile.ZipFile(path) as archive:
            return str(components.wheel_digest(archive))
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""


def named(path: str) -> tuple[str, str]:
    """Name and version of a wheel's distribution."""
    name, version = Path(path).name.split("-")[:2]
    return canonical(name), version


def places(folder: str, entries: Iterable[Entry]) -> list[str]:
    """Paths at which module `release` and bootstrap install the wheels of a FOLDER with these ENTRIES."""
    lines = "".join(f"{each.sha256} {each.path}\n" for each in sorted(entries, key=lambda each: each.path))
    release = hashlib.sha256(lines.encode()).hexdigest()[:DIGITS]
    requirements = [each.sha256[:DIGITS] for each in entries if each.path == f"{folder}/requirements.txt"]
    return [f"{RELEASES}{release}/", *(f"{CONTROL}{each}/" for each in requirements)]


def read(places: Places) -> Catalogue:
    """Read all bundles and releases on the control node, whose signatures bootstrap and `release add` verified."""
    current = (places.bundles / "current").resolve()
    bundles = sorted(places.bundles.glob("[0-9]*"), key=lambda path: path.resolve() != current)
    carriers = []
    for kind, folder in [
        *(("bundle", path) for path in bundles),
        *(("release", path) for path in places.releases.glob("[!.]*")),
    ]:
        try:
            listed = manifest.read(folder)
        except BundleRefused:
            continue  # half of one
        name = f"release {folder.name} {listed.serial}" if kind == "release" else f"bundle {listed.serial}"
        carriers.append(Carrier(name, folder, listed))
    return Catalogue(carriers)
