"""A host's components with their origins, as a CycloneDX document, and its missing components."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmkeep.bundle import bill
from llmkeep.bundle.bill import APPLICATION, LIBRARY, MODEL, Component
from llmkeep.bundle.wheels import canonical
from llmkeep.sbom.answers import Answer, Distribution, File
from llmkeep.sbom.catalogue import Carried, Catalogue
from llmproof.sbom import ORIGIN, UNKNOWN

DRIVER = "device-driver"


def document(host: str, answer: Answer, catalogue: Catalogue, created: str) -> dict[str, Any]:
    """The CycloneDX document of a host."""
    subject = Component(
        host, kind="device", properties={"skipped": ", ".join(answer.skipped)} if answer.skipped else {}
    )
    return bill.document(subject, components(answer, catalogue), created)


def components(answer: Answer, catalogue: Catalogue) -> Iterator[Component]:
    """A host's installed components, each with its origin."""
    yield from _packages(answer, catalogue)
    installed = {
        each.name: catalogue.packages.get((each.name, each.version, each.architecture))
        for each in answer.packages
    }
    yield from (_distribution(each, catalogue, installed.get(each.package)) for each in answer.python)
    yield from (_file(each, catalogue, APPLICATION) for each in answer.programs)
    yield from (_file(each, catalogue, LIBRARY) for each in answer.scripts)
    yield from (_model(each, catalogue) for each in answer.models)
    yield from _modules(answer, installed)


def _packages(answer: Answer, catalogue: Catalogue) -> Iterator[Component]:
    for each in answer.packages:
        carried = catalogue.packages.get((each.name, each.version, each.architecture))
        yield Component(
            name=each.name,
            version=each.version,
            purl=carried.entry.purl
            if carried
            else _purl("deb", each.name, each.version, "debian", each.architecture),
            licence=carried.entry.licence if carried else "",
            properties=_properties(carried, source=f"{each.source} {each.source_version}"),
        )


def _distribution(each: Distribution, catalogue: Catalogue, package: Carried | None) -> Component:
    """Distributions are known by name, version and record: a wheel of that name with other modules is not the bundle's.

    `package`: the bundle's package from whose wheel it was unpacked.
    """
    wheels = catalogue.wheels.get((canonical(each.name), each.version), [])
    carried = next(
        (wheel for wheel in wheels if each.record and catalogue.record(wheel) == each.record), None
    )
    origin = None
    if not carried and package:
        origin = f"unpacked on the host from {each.package} of {package.origin}"
    elif not carried and wheels:
        origin = f"{UNKNOWN}: {wheels[0].origin} has one with other modules"
    return Component(
        name=each.name,
        version=each.version,
        purl=bill.of_entry(carried.entry).purl
        if carried
        else _purl("pypi", canonical(each.name), each.version),
        licence=carried.entry.licence if carried else "",
        place=each.place,
        properties=_properties(carried, origin, record=each.record),
    )


def _file(each: File, catalogue: Catalogue, kind: str) -> Component:
    carried = catalogue.files.get(each.sha256)
    known = bill.of_entry(carried.entry) if carried else None
    return Component(
        name=known.name if known else each.path,
        version=known.version if known else "",
        purl=known.purl if known else "",
        sha256=each.sha256,
        licence=known.licence if known else "",
        kind=kind,
        place=each.path,
        properties=_properties(carried),
    )


def _model(each: File, catalogue: Catalogue) -> Component:
    carried = catalogue.models.get(each.sha256) if each.sha256 else None
    return Component(
        name=each.path.rpartition("/")[2],
        version=carried.entry.purl.rpartition("@")[2] if carried else "",
        purl=carried.entry.purl if carried else "",
        sha256=each.sha256,
        licence=carried.entry.licence if carried else "",
        kind=MODEL,
        place=each.path,
        properties=_properties(carried),
    )


def _modules(answer: Answer, installed: Mapping[str, Carried | None]) -> Iterator[Component]:
    """Kernel modules built by DKMS are known if the package with their sources is."""
    for each in answer.modules:
        source = installed.get(each.package)
        origin = f"built on the host from {each.package} of {source.origin}" if source else UNKNOWN
        yield Component(
            each.path, sha256=each.sha256, kind=DRIVER, place=each.path, properties={ORIGIN: origin}
        )
    for name in answer.loaded:
        yield Component(f"loaded module {name}", kind=DRIVER, properties={ORIGIN: UNKNOWN})


def _properties(carried: Carried | None, origin: str | None = None, **more: str) -> dict[str, str]:
    where = origin or (carried.origin if carried else UNKNOWN)
    return {ORIGIN: where, **{name: value for name, value in more.items() if value}}


def _purl(kind: str, name: str, version: str, namespace: str = "", architecture: str = "") -> str:
    from packageurl import PackageURL

    qualifiers = {"arch": architecture} if architecture else None
    return PackageURL(kind, namespace or None, name or "unnamed", version or None, qualifiers).to_string()


def missing(answer: Answer, catalogue: Catalogue, roles: Sequence[str]) -> list[str]:
    """Components of the bundle in use that a host with these ROLES lacks: locked packages, and wheels of its environments."""
    if not catalogue.current:
        return ["the control node has no bundle to compare with"]
    return [*_missing_packages(answer, catalogue, roles), *_missing_wheels(answer.python, catalogue)]


def _missing_packages(answer: Answer, catalogue: Catalogue, roles: Sequence[str]) -> Iterator[str]:
    installed = {each.name: each.version for each in answer.packages}
    for role in roles:
        for key in catalogue.roles.get(role, []):
            name, _, version = key.partition("=")
            if installed.get(name) != version:
                yield f"{name} {version}, of role {role}: the host has {installed.get(name, 'none')}"


def _missing_wheels(python: Iterable[Distribution], catalogue: Catalogue) -> Iterator[str]:
    by_home: dict[str, set[tuple[str, str]]] = {}
    for each in python:
        home = "/".join(
            each.place.split("/")[:5]
            if each.place.startswith("/opt/llmkeep/releases/")
            else each.place.split("/")[:4]
        )
        by_home.setdefault(f"{home}/", set()).add((canonical(each.name), each.version))
    for home, there in sorted(by_home.items()):
        folder, wheels = catalogue.environments.get(home, ("", []))
        for wheel in wheels:
            component = bill.of_entry(wheel.entry)
            if (canonical(component.name), component.version) not in there:
                yield f"{component.purl}, of {folder}: {home} lacks this version"
