"""Software bills of materials (CycloneDX 1.6) of bundles, images and hosts. The same components give the same bytes."""

import hashlib
import json
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmkeep.bundle import cache, licences, manifest, site
from llmkeep.bundle.manifest import Entry, Manifest

MEDIA_TYPE = "application/vnd.cyclonedx+json"
PREFIX = "llmkeep:"  # of our properties
# Kinds of components, as CycloneDX names them.
APPLICATION, CONTAINER, FILE, LIBRARY, MODEL = (
    "application", "container", "file", "library", "machine-learning-model"
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One component.

    `sha256`: of its file, or of the checksums of its files; `licence`: as stated; `place`: its path on a host;
    `properties`: llmkeep's own, by name, in full or without PREFIX.
    """

    name: str
    version: str = ""
    purl: str = ""
    sha256: str = ""
    licence: str = ""
    kind: str = LIBRARY
    place: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """A name that is unique within a bill."""
        name = self.purl or quote(f"{self.kind}:{self.name}", safe=":/@")
        own = quote(self.place, safe="/") if self.place else self.sha256[:16]
        return f"{name}#{own}" if own else name


def document(subject: Component, components: Iterable[Component], created: str) -> dict[str, Any]:
    """The bill of SUBJECT. `created`: time of creation, as in manifests (UTC)."""
    from cyclonedx.model.bom import Bom, BomMetaData  # 0.05 s: not for the rest of the program
    from cyclonedx.output.json import JsonV1Dot6

    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{subject.ref} {created}"),
        metadata=BomMetaData(
            component=_component(subject, subject.ref), timestamp=datetime.fromisoformat(created)
        ),
        components=[_component(each, ref) for ref, each in _unique(components).items()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the dependencies, which are taken out below
        made: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    # An empty graph would say that no component needs another one; without any, that is unknown.
    made.pop("dependencies", None)
    return made


def encoded(made: Mapping[str, Any]) -> bytes:
    """The bytes of a bill's file."""
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def _unique(components: Iterable[Component]) -> dict[str, Component]:
    """Give each component a unique `bom-ref`, so that none hides another with the same name."""
    unique: dict[str, Component] = {}
    for each in components:
        ref = each.ref
        while unique.get(ref, each) != each:
            ref += "~"
        unique[ref] = each
    return unique


def _component(component: Component, ref: str) -> Any:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component as Element
    from cyclonedx.model.component import ComponentType
    from packageurl import PackageURL

    expression = licences.spdx(component.licence)
    properties = {**({"place": component.place} if component.place else {}), **component.properties}
    if expression not in (component.licence, licences.UNSTATED):
        properties["licence"] = component.licence
    return Element(
        type=ComponentType(component.kind),
        name=component.name,
        version=component.version or None,
        bom_ref=ref,
        purl=PackageURL.from_string(component.purl) if component.purl else None,
        licenses=[] if expression == licences.UNSTATED else [LicenseFactory().make_from_string(expression)],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=component.sha256)] if component.sha256 else [],
        properties=[
            Property(name=f"{PREFIX}{name.removeprefix(PREFIX)}", value=value)
            for name, value in properties.items()
        ],
    )


def of_entry(entry: Entry) -> Component:
    """The component for one file of a bundle: a package, a wheel, a program or a script."""
    from packageurl import PackageURL

    purl = PackageURL.from_string(entry.purl or own_wheel(entry.path))
    return Component(
        name=purl.name,
        version=purl.version or "",
        purl=purl.to_string(),
        sha256=entry.sha256,
        licence=entry.licence,
        kind=APPLICATION if entry.path.startswith("bin/") else LIBRARY,
    )


def own_wheel(path: str) -> str:
    """The purl of one of llmkeep's own wheels, which no registry has."""
    name, version = Path(path).name.split("-")[:2]
    return f"pkg:generic/{name.replace('_', '-')}@{version}"


def sums(entries: Iterable[Entry], prefix: str = "") -> str:
    """SHA-256 of what `sha256sum` prints of these files below PREFIX, sorted by path."""
    lines = sorted((entry.path.removeprefix(prefix), entry.sha256) for entry in entries)
    return hashlib.sha256("".join(f"{digest}  {path}\n" for path, digest in lines).encode()).hexdigest()


def components(listed: Manifest) -> list[Component]:
    """All components of a bundle.

    A model, the tree of playbooks and the documentation are one component each; see `sums`.
    """
    rows, models, tree, packages = [], dict[str, list[Entry]](), list[Entry](), list[Entry]()
    documentation: dict[str, list[Entry]] = {}
    for entry in listed.files:
        folder, _, rest = entry.path.partition("/")
        if folder == "models":
            models.setdefault(rest.split("/")[0], []).append(entry)
        elif folder == site.FOLDER:
            documentation.setdefault(entry.purl, []).append(entry)
        elif entry.purl and not entry.path.endswith(".LICENSE"):
            packages.append(entry)
        elif folder == "tree":
            tree.append(entry)
        elif entry.path.endswith(".whl"):
            packages.append(entry)
        else:
            rows.append(Component(entry.path, sha256=entry.sha256, licence=entry.licence, kind=FILE))
    rows += map(of_entry, packages)
    for name, entries in models.items():
        purl = entries[0].purl
        rows.append(
            Component(
                name,
                purl.rpartition("@")[2],
                purl,
                sums(entries, f"models/{name}/"),
                entries[0].licence,
                MODEL,
            )
        )
    for purl, entries in documentation.items():
        hashed = sums(entries, f"{site.FOLDER}/")
        rows.append(replace(of_entry(entries[0]), sha256=hashed) if purl else _ours(entries))
    if tree:
        rows.append(_ours(tree))
    return rows


def _ours(entries: list[Entry]) -> Component:
    """One component for all of llmkeep's own files in a folder of the bundle."""
    folder, commit = entries[0].path.partition("/")[0], entries[0].source.removeprefix("git:")
    purl = f"pkg:generic/llmkeep-{folder}@{quote(commit, safe='')}"
    return Component(
        f"llmkeep-{folder}", commit, purl, sums(entries, f"{folder}/"), "Apache-2.0", APPLICATION
    )


def of_bundle(folder: Path) -> dict[str, Any]:
    """The bill of a bundle, whose signature `llmkeep bundle verify` checks."""
    listed = manifest.read(folder)
    subject = Component(
        name="llmkeep-bundle",
        version=str(listed.serial),
        sha256=cache.sha256(folder / manifest.NAME),
        kind=APPLICATION,
        properties={"profile": listed.profile, "signer": listed.signer},
    )
    return document(subject, components(listed), listed.created)
