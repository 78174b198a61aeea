"""Sources of Debian packages, and the packages that each may provide (`apt.sources` of artifacts.yml).

A source without `packages` is Debian's own and provides everything it has. Any other source provides only the
packages it lists, even for dependencies, and replaces a package of Debian only if `replaces_debian` names it.

The rules are applied twice. Pins keep apt from choosing packages that a source may not provide. They name package and
version, because vendors control the fields that apt's `Pin: release` and `Pin: origin` match. Each chosen package is
then looked up by SHA256 in the signed indices, and refused if no source may provide it.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkeep.bundle import cache, signing
from llmkeep.errors import LlmkeepError, Refused

# Exit codes of `llmkeep lock update` and `bundle build`.
UNREACHABLE, UNTRUSTED, FORBIDDEN = 3, 4, 5

FINGERPRINT = re.compile(r"[0-9A-F]{40}|[0-9A-F]{64}")
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
NAME, VERSION = re.compile(r"[a-z0-9][a-z0-9+.-]+"), re.compile(r"[0-9A-Za-z.+~:-]+")
FIELD = re.compile(
    r"^(Package|Version|SHA256|Provides|Replaces):[ \t]*(.*(?:\n[ \t].*)*)", re.MULTILINE | re.IGNORECASE
)


class PackagesRefused(Refused):
    """A source or a package cannot be used."""


@dataclass(frozen=True)
class Source:
    """An entry of `apt.sources`. `packages`: globs, or None for everything; `files`: SHA256 by name in `directory`.

    Debian's own mirrors have neither `uri` nor `directory`. `key` and `directory` are relative to the tree.
    """

    name: str
    suites: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    packages: tuple[str, ...] | None = None
    replaces_debian: tuple[str, ...] = ()
    uri: str = ""
    key: str = ""
    fingerprint: str = ""
    directory: str = ""
    files: tuple[tuple[str, str], ...] = ()
    licence: str = ""

    @property
    def debian(self) -> bool:
        """Whether its packages come from Debian."""
        return not (self.uri or self.directory)

    def lists(self, package: str) -> bool:
        """Whether its entry names this package."""
        return self.packages is None or any(fnmatch.fnmatchcase(package, glob) for glob in self.packages)


@dataclass(frozen=True)
class Offer:
    """A package in a source's index. `claims`: the names that it provides or replaces in addition to its own."""

    package: str
    version: str
    sha256: str
    claims: frozenset[str]

    @property
    def identity(self) -> tuple[str, str]:
        """`name=version` and SHA256, as in apt's choice."""
        return f"{self.package}={self.version}", self.sha256


def parse(name: str, entry: Mapping[str, Any]) -> Source:
    """The source of an entry in artifacts.yml or artifacts.d; LlmkeepError where the entry contradicts itself."""

    def refuse(what: str) -> LlmkeepError:
        return LlmkeepError(f"apt.sources has {name}, {what} (docs/operate/packages.md)")

    if not SOURCE_NAME.fullmatch(name):
        raise refuse("which is not a valid source name: use lowercase letters, digits and hyphens")
    for key in ("suites", "components", "packages", "replaces_debian"):
        if not isinstance(entry.get(key, []), list):
            raise refuse(f"whose {key} is {entry[key]!r}: write a list")
    source = Source(
        name=name,
        suites=tuple(entry.get("suites", ())),
        components=tuple(entry.get("components", ())),
        packages=tuple(entry["packages"]) if "packages" in entry else None,
        replaces_debian=tuple(entry.get("replaces_debian", ())),
        files=tuple(sorted(entry.get("files", {}).items())),
        **{key: str(entry.get(key) or "") for key in ("uri", "key", "fingerprint", "directory", "licence")},
    )
    if source.uri and source.directory:
        raise refuse("which names both a uri and a directory: keep one of them")
    if source.directory and not source.files:
        raise refuse(f"which names no files: list each .deb of {source.directory} with its sha256")
    if not source.directory and not source.suites:
        raise refuse("which names no suites: list the suites to take packages from")
    if source.uri and source.packages is None:
        raise refuse("which lists no packages: list the packages that it may provide")
    if not source.debian and not source.licence:
        raise refuse("which states no licence: add one for packages without a copyright file")
    for place in (source.key, source.directory):
        if place.startswith("/") or ".." in Path(place).parts:
            raise refuse(f"which names {place}: give a path below the tree")
    return source


def keyring(source: Source, tree: Path) -> Path:
    """The file with the source's key, after its fingerprint was compared with the stated one."""
    place = tree / (source.key or f"artifacts.d/keys/{source.name}.asc")
    if not FINGERPRINT.fullmatch(stated := source.fingerprint.replace(" ", "").upper()):
        raise PackagesRefused(
            UNTRUSTED,
            f"the source {source.name} ({source.uri}) has the fingerprint {source.fingerprint!r}, which is not a key "
            "fingerprint: get its 40 hex digits from the vendor, and state them in artifacts.d (docs/operate/packages.md)",
        )
    if not place.is_file():
        raise PackagesRefused(
            UNTRUSTED,
            f"the key of the source {source.name} ({source.uri}) is missing: put the vendor's key {stated} into {place}",
        )
    marks = signing.fingerprints(place)
    if marks != [stated]:
        raise PackagesRefused(
            UNTRUSTED,
            f"{place} holds the key {', '.join(marks)}, but the source {source.name} states {stated}: do not use it until "
            "the vendor confirms the change of key",
        )
    return place


def offers(index: str) -> Iterator[Offer]:
    """Packages of an index. Names and versions that violate Debian's policy are left out, and so cannot be chosen."""
    for paragraph in index.split("\n\n"):
        fields = {name.lower(): value for name, value in FIELD.findall(paragraph)}
        package, version = fields.get("package", ""), fields.get("version", "")
        if not NAME.fullmatch(package) or not VERSION.fullmatch(version):
            continue
        relations = ",".join(fields.get(key, "") for key in ("provides", "replaces"))
        claims = frozenset(re.findall(r"(?:^|,)\s*([a-z0-9][a-z0-9+.-]+)", relations))
        yield Offer(package, version, fields.get("sha256", "").strip(), claims)


class Rules:
    """The rules for choosing among the offers of several sources.

    Sources are in artifacts.yml's order, which breaks ties.
    """

    def __init__(self, offered: Mapping[Source, list[Offer]]) -> None:
        self.offered = [(source, offer) for source, offers in offered.items() for offer in offers]
        self.debian = {offer.package for source, offer in self.offered if source.debian}
        self.allowed: dict[tuple[str, str], tuple[Source, Offer]] = {}  # by identity
        self.versions: dict[tuple[str, str], str] = {}  # what is allowed: name and version to SHA256
        self.having: dict[str, list[str]] = {}  # SHA256 to names of sources
        for source, offer in self.offered:
            self.having.setdefault(offer.sha256, []).append(source.name)
            if self.may_provide(source, offer.package):
                self.allowed.setdefault(offer.identity, (source, offer))
                self.versions.setdefault((offer.package, offer.version), offer.sha256)
        self._refuse_named_replacements()
        self._refuse_two_vendors()

    def may_provide(self, source: Source, package: str) -> bool:
        """Whether the source lists the package, and Debian either lacks it or may be replaced."""
        new = source.debian or package not in self.debian or package in source.replaces_debian
        return new and source.lists(package)

    def pins(self) -> str:
        """apt_preferences that exclude packages a source may not provide, and prefer the intended replacements."""
        pins: dict[str, int] = {}
        for source, offer in self.offered:
            if source.packages is None:
                continue
            pin = f"Package: {offer.package}\nPin: version {offer.version}\n"
            if self.may_provide(source, offer.package):
                if offer.package in self.debian:
                    pins[pin] = 990
            elif self.versions.get((offer.package, offer.version), offer.sha256) != offer.sha256:
                raise PackagesRefused(
                    FORBIDDEN,
                    f"the source {source.name} has {offer.package} {offer.version}, which it may not provide; another "
                    "source has the same version with different content, and apt cannot tell them apart: do not use it, ask "
                    "the vendor",
                )
            elif offer.identity not in self.allowed:  # in Debian's own bytes it is Debian's
                pins[pin] = -1
        return "\n".join(f"{pin}Pin-Priority: {priority}\n" for pin, priority in pins.items())

    def held_back(self, words: str) -> list[tuple[str, str]]:
        """Source and name of packages mentioned in WORDS of apt that their source may not provide."""
        named, exact = (
            set(re.findall(NAME, words)),
            set(re.findall(r"([a-z0-9+.-]+)(?::\w+)?=([^\s)]+)", words)),
        )
        pairs = {
            (source.name, offer.package)
            for source, offer in self.offered
            if (offer.package in named - self.debian or (offer.package, offer.version) in exact)
            and not self.may_provide(source, offer.package)
        }
        return sorted(pairs)

    def require_same(self, key: str, sha256: str, control: str) -> None:
        """Refuse a package whose control file contradicts its index, to which all rules were applied."""
        _, offer = self.allowed[key, sha256]
        inside = next(offers(control), None)
        if inside is None or (inside.package, inside.version, inside.claims) != (
            offer.package,
            offer.version,
            offer.claims,
        ):
            content = f"{inside.package} {inside.version}" if inside else "no valid name and version"
            raise PackagesRefused(
                FORBIDDEN,
                f"{key} does not match the index of {', '.join(self.having[sha256])}: the file is {content}, or provides or "
                "replaces other packages: do not use it, ask the vendor",
            )

    def source(self, key: str, sha256: str) -> Source:
        """The source that provides the chosen package (`name=version`); PackagesRefused if none may."""
        if (key, sha256) not in self.allowed:
            names = ", ".join(dict.fromkeys(self.having.get(sha256, ["no source"])))
            raise PackagesRefused(
                FORBIDDEN,
                f"{key} would come from {names}, which may not provide it: add the name to the packages of that source, or "
                "remove from the roles the package that depends on it",
            )
        source, offer = self.allowed[key, sha256]
        taken = sorted(offer.claims & self.debian - set(source.replaces_debian) - {offer.package})
        if not source.debian and taken:
            raise PackagesRefused(
                FORBIDDEN,
                f"{key} of the source {source.name} provides or replaces {', '.join(taken)}, which Debian has: list these "
                "names under replaces_debian of that source if this is intended, or remove the package from the roles",
            )
        return source

    def _refuse_named_replacements(self) -> None:
        """Refuse full names and files that would replace a package of Debian; globs skip those."""
        for source, offer in self.offered:
            meant = source.directory or offer.package in (source.packages or ())
            if not source.debian and meant and not self.may_provide(source, offer.package):
                raise PackagesRefused(
                    FORBIDDEN,
                    f"the source {source.name} ({source.uri or source.directory}) would replace Debian's {offer.package} "
                    f"with its own {offer.version}: remove it, or list {offer.package} under replaces_debian of that source",
                )

    def _refuse_two_vendors(self) -> None:
        first: dict[str, Source] = {}
        for source, offer in self.offered:
            if source.debian or not self.may_provide(source, offer.package):
                continue
            if (other := first.setdefault(offer.package, source)) is not source:
                raise PackagesRefused(
                    FORBIDDEN,
                    f"{offer.package} is provided by both {other.name} and {source.name}: narrow the packages of "
                    "one of them",
                )


def collect(source: Source, tree: Path) -> dict[str, Path]:
    """The .deb files of a vendor's directory, by name, each with its stated SHA256."""
    folder, stated = tree / source.directory, dict(source.files)
    if not folder.is_dir():
        raise PackagesRefused(
            UNREACHABLE,
            f"the source {source.name}: {folder} does not exist: put the vendor's .deb files there",
        )
    files = {path.name: path for path in sorted(folder.glob("*.deb"))}
    for name in sorted(files.keys() ^ stated.keys()):
        raise PackagesRefused(
            FORBIDDEN,
            f"{folder / name} is not listed under files of the source {source.name}: list it with its sha256, or remove it"
            if name in files
            else f"{folder / name} is missing, but the source {source.name} lists it: add the file, or remove it from files",
        )
    for name, path in files.items():
        if path.is_symlink():
            raise PackagesRefused(FORBIDDEN, f"{path} is a symbolic link: replace it with the file itself")
        if (digest := cache.sha256(path)) != stated[name]:
            raise PackagesRefused(
                FORBIDDEN,
                f"{path} has sha256 {digest}, the source {source.name} states {stated[name]}: fetch it from the vendor again",
            )
    return files
