"""Sources of Debian packages: which may provide what, by `apt.sources` of artifacts.yml.

A source without `packages` is Debian's own and provides everything it has. Every other one provides the packages it lists
and nothing else, not even as a dependency, and what Debian has too only where `replaces_debian` names it.

The rules are applied twice. Pins keep apt from choosing what a source may not provide. They name package and version, since the
fields that apt's own `Pin: release` and `Pin: origin` go by are the vendor's to write. Then each chosen package is looked up, by
its SHA256, in the indices that its signers signed; one that no source may provide is refused.
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
        """Whether its packages are Debian's."""
        return not (self.uri or self.directory)

    def lists(self, package: str) -> bool:
        """Whether its entry names this package."""
        return self.packages is None or any(fnmatch.fnmatchcase(package, glob) for glob in self.packages)


@dataclass(frozen=True)
class Offer:
    """A package of a source's index. `claims`: the names that it provides or replaces beside its own."""

    package: str
    version: str
    sha256: str
    claims: frozenset[str]

    @property
    def identity(self) -> tuple[str, str]:
        """As apt's choice names it: `name=version` and SHA256."""
        return f"{self.package}={self.version}", self.sha256


def parse(name: str, entry: Mapping[str, Any]) -> Source:
    """The source of an entry in artifacts.yml or artifacts.d; LlmkeepError where the entry contradicts itself."""

    def refuse(what: str) -> LlmkeepError:
        return LlmkeepError(f"apt.sources has {name}, {what} (docs/operate/packages.md)")

    if not SOURCE_NAME.fullmatch(name):
        raise refuse("which is no name of a source: use small letters, digits and hyphens")
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
        raise refuse("which names no suites: list those to take packages from")
    if source.uri and source.packages is None:
        raise refuse("which may provide everything: list the packages that it may provide")
    if not source.debian and not source.licence:
        raise refuse("which states no licence: add that of packages without a copyright file")
    for place in (source.key, source.directory):
        if place.startswith("/") or ".." in Path(place).parts:
            raise refuse(f"which names {place}: give a path below the tree")
    return source


def keyring(source: Source, tree: Path) -> Path:
    """The file with the source's key, whose fingerprint is the stated one."""
    place = tree / (source.key or f"artifacts.d/keys/{source.name}.asc")
    if not FINGERPRINT.fullmatch(stated := source.fingerprint.replace(" ", "").upper()):
        raise PackagesRefused(
            UNTRUSTED,
            f"the source {source.name} ({source.uri}) has the fingerprint {source.fingerprint!r}, which llmkeep does not "
            "know: learn its 40 hex digits from the vendor, and state them in artifacts.d (docs/operate/packages.md)",
        )
    if not place.is_file():
        raise PackagesRefused(
            UNTRUSTED,
            f"the key of the source {source.name} ({source.uri}) is not there: put the vendor's key {stated} into {place}",
        )
    marks = signing.fingerprints(place)
    if marks != [stated]:
        raise PackagesRefused(
            UNTRUSTED,
            f"{place} holds the key {', '.join(marks)}, and the source {source.name} wants {stated}: do not use it "
            "until the vendor confirms a change of its key",
        )
    return place


def offers(index: str) -> Iterator[Offer]:
    """Packages of an index. Names and versions against Debian's policy are left out, and so cannot be chosen."""
    for paragraph in index.split("\n\n"):
        fields = {name.lower(): value for name, value in FIELD.findall(paragraph)}
        package, version = fields.get("package", ""), fields.get("version", "")
        if not NAME.fullmatch(package) or not VERSION.fullmatch(version):
            continue
        relations = ",".join(fields.get(key, "") for key in ("provides", "replaces"))
        claims = frozenset(re.findall(r"(?:^|,)\s*([a-z0-9][a-z0-9+.-]+)", relations))
        yield Offer(package, version, fields.get("sha256", "").strip(), claims)


class Rules:
    """What may be chosen of several sources' offers. Sources come in artifacts.yml's order, which decides between equals."""

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
        """Whether the source lists the package, and Debian does not have it or may be replaced."""
        new = source.debian or package not in self.debian or package in source.replaces_debian
        return new and source.lists(package)

    def pins(self) -> str:
        """apt_preferences: never what a source may not provide; first what is to take the place of another version."""
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
                    f"the source {source.name} has {offer.package} {offer.version}, which it may not provide, in the "
                    "version of another source with other bytes, and apt cannot tell them apart: do not use it, ask the vendor",
                )
            elif offer.identity not in self.allowed:  # in Debian's own bytes it is Debian's
                pins[pin] = -1
        return "\n".join(f"{pin}Pin-Priority: {priority}\n" for pin, priority in pins.items())

    def held_back(self, words: str) -> list[tuple[str, str]]:
        """Source and name of packages that WORDS of apt name and that their source may not provide."""
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
        """Refuse a package whose own control file is not what its index said, on which all rules were applied."""
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
                f"{key} is not what the index of {', '.join(self.having[sha256])} says: the file is {content}, or provides or "
                "replaces other packages: do not use it, and ask the vendor",
            )

    def source(self, key: str, sha256: str) -> Source:
        """The source that provides the chosen package (`name=version`); PackagesRefused if none may."""
        if (key, sha256) not in self.allowed:
            names = ", ".join(dict.fromkeys(self.having.get(sha256, ["no source"])))
            raise PackagesRefused(
                FORBIDDEN,
                f"{key} would come from {names}, which may not provide it: add the name to the packages of that source, "
                "or take what needs it out of the roles",
            )
        source, offer = self.allowed[key, sha256]
        taken = sorted(offer.claims & self.debian - set(source.replaces_debian) - {offer.package})
        if not source.debian and taken:
            raise PackagesRefused(
                FORBIDDEN,
                f"{key} of the source {source.name} provides or replaces {', '.join(taken)}, which Debian has: list "
                "these names under replaces_debian of that source if you want that, or take the package out of the roles",
            )
        return source

    def _refuse_named_replacements(self) -> None:
        """Globs pass over what Debian has; a name written in full, or a file, is meant."""
        for source, offer in self.offered:
            meant = source.directory or offer.package in (source.packages or ())
            if not source.debian and meant and not self.may_provide(source, offer.package):
                raise PackagesRefused(
                    FORBIDDEN,
                    f"the source {source.name} ({source.uri or source.directory}) would replace Debian's {offer.package} "
                    f"by its own {offer.version}: take it out, or list {offer.package} under replaces_debian of that source",
                )

    def _refuse_two_vendors(self) -> None:
        first: dict[str, Source] = {}
        for source, offer in self.offered:
            if source.debian or not self.may_provide(source, offer.package):
                continue
            if (other := first.setdefault(offer.package, source)) is not source:
                raise PackagesRefused(
                    FORBIDDEN,
                    f"{offer.package} may come from {other.name} and from {source.name}: narrow the packages of one of them",
                )


def collect(source: Source, tree: Path) -> dict[str, Path]:
    """The .deb files of a vendor's directory, by name, each with its stated SHA256."""
    folder, stated = tree / source.directory, dict(source.files)
    if not folder.is_dir():
        raise PackagesRefused(
            UNREACHABLE, f"the source {source.name}: there is no {folder}: put the vendor's .deb files there"
        )
    files = {path.name: path for path in sorted(folder.glob("*.deb"))}
    for name in sorted(files.keys() ^ stated.keys()):
        raise PackagesRefused(
            FORBIDDEN,
            f"{folder / name} is not listed under files of the source {source.name}: list it with its sha256, or remove it"
            if name in files
            else f"{folder / name} is not there, and the source {source.name} lists it: bring it, or take it out of files",
        )
    for name, path in files.items():
        if path.is_symlink():
            raise PackagesRefused(FORBIDDEN, f"{path} is a link: put the file itself there")
        if (digest := cache.sha256(path)) != stated[name]:
            raise PackagesRefused(
                FORBIDDEN,
                f"{path} has sha256 {digest}, the source {source.name} states {stated[name]}: fetch it from the vendor again",
            )
    return files
