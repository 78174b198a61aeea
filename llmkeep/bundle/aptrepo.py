"""Debian packages: resolve a closure, download exactly the locked packages, build a signed repository.

apt does the first two with a private state: only the sources in artifacts.yml, no installed packages, none of the
machine's pins. Debian's mirrors, their keys and the proxy come from the machine's own apt settings.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmkeep.bundle import additions, aptsources, cache, signing
from llmkeep.bundle.aptsources import FORBIDDEN, UNREACHABLE, UNTRUSTED, PackagesRefused, Rules, Source
from llmkeep.bundle.lock import Deb
from llmkeep.errors import LlmkeepError, printable
from llmkeep.source_tree import TREE

SUITE, COMPONENT = "trixie", "main"
UNKNOWN_LICENCE = "NOASSERTION"
OUT_OF_REACH = re.compile(
    r"Could not (?:resolve|connect)|Unable to connect|Cannot initiate|[Tt]imed out|unreachable"
    r"|Connection (?:failed|refused|reset)|Temporary failure|does not have a Release file|\b(?:40[0-9]|5\d\d) +[A-Z]"
)


class Apt:
    """apt with its own state in the cache. `section` is `apt` of artifacts.yml; `sources` names the sources to use."""

    def __init__(self, section: dict[str, Any], sources: list[str], tree: Path = TREE) -> None:
        if gone := sorted(set(sources) - set(section["sources"])):
            raise LlmkeepError(
                f"the lock has packages from {', '.join(gone)}, but apt.sources has only {', '.join(section['sources'])}: "
                "run `llmkeep lock update --only apt`"
            )
        entries = section["sources"].items()
        self.sources = [aptsources.parse(name, entry) for name, entry in entries if name in sources]
        self.tree, self.folder = tree, cache.home() / "apt"
        self.archives, self.entries = self.folder / "archives", self.folder / "sources.d"
        for folder in (self.folder / "lists" / "partial", self.archives / "partial", self.entries):
            folder.mkdir(parents=True, exist_ok=True)
        for stale in self.entries.iterdir():
            stale.unlink()
        (self.folder / "status").touch()
        (self.folder / "preferences").write_text("")
        self.config = self.folder / "apt.conf"
        self.config.write_text(f"""
Dir::State "{self.folder}"; Dir::State::Lists "{self.folder}/lists";
Dir::State::status "{self.folder}/status";
Dir::Cache "{self.folder}"; Dir::Cache::archives "{self.archives}";
Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "{self.entries}";
Dir::Etc::preferences "{self.folder}/preferences"; Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "{section["architecture"]}"; APT::Architectures {{ "{section["architecture"]}"; }};
APT::Install-Recommends "false"; APT::Sandbox::User "root"; APT::Update::Error-Mode "any"; APT::Get::List-Cleanup "false";
APT::Get::AllowUnauthenticated "false"; Acquire::AllowInsecureRepositories "false"; Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Check-Valid-Until "true"; Acquire::Check-Date "true"; Acquire::ForceHash "SHA256";
Acquire::Languages "none";
""")

    def get(self, *arguments: str) -> str:
        """Run apt-get; an error carries apt's own message."""
        run = self._run(*arguments)
        if run.returncode != 0:
            raise LlmkeepError(f"apt-get {arguments[0]} failed:\n{run.stderr.strip()}")
        return run.stdout

    def update(self) -> Rules:
        """Fetch every source's signed index, and pin the packages that each may not provide.

        PackagesRefused names each failed source.
        """
        failed: list[tuple[int, str]] = []
        for source in self.sources:
            entry = self.entries / f"{source.name}.sources"
            try:
                entry.write_text(self._entry(source))
            except PackagesRefused as refusal:
                failed.append((refusal.code, str(refusal)))
                continue
            run = self._run(
                "update", f"--option=Dir::Etc::sourcelist={entry}", "--option=Dir::Etc::sourceparts=/dev/null"
            )
            if run.returncode != 0:
                words = _reasons(run.stderr)
                # Also what is not there is "not signed".
                causes = [line for line in words if not line.endswith("is not signed.")] or words
                code = UNREACHABLE if all(map(OUT_OF_REACH.search, causes)) else UNTRUSTED
                failed.append(
                    (
                        code,
                        f"{source.name}, {'not reached' if code == UNREACHABLE else 'refused'}: {'; '.join(words)}",
                    )
                )
        if failed:
            lines = "".join(f"\n  {line}" for _, line in failed)
            raise PackagesRefused(
                max(code for code, _ in failed),
                f"{len(failed)} of {len(self.sources)} package sources cannot be used, and nothing was changed:{lines}",
            )
        rules = Rules({source: list(self._offers(source)) for source in self.sources})
        (self.folder / "preferences").write_text(rules.pins())
        return rules

    def closure(self, packages: list[str]) -> dict[str, str]:
        """All packages needed to install these on an empty machine: `name=version` to SHA256."""
        digests_of = {}
        for line in self.get("install", "--print-uris", *packages).splitlines():
            _, file, _, digest = [*line.split(), ""][:4]
            name, version, _ = file.removesuffix(".deb").split("_")
            digests_of[f"{name}={version.replace('%3a', ':')}"] = digest.removeprefix("SHA256:")
        return dict(sorted(digests_of.items()))

    def download(self, keys: list[str]) -> dict[str, str]:
        """Download packages (`name=version`) into the cache; returns their sha256. An interrupted download is resumed."""
        try:
            self.get("install", "--download-only", "--no-remove", *keys)
        except LlmkeepError as error:
            gone = re.findall(r"Version '([^']+)' for '([^']+)' was not found", str(error))
            if gone:
                names = ", ".join(f"{name}={version}" for version, name in gone)
                raise Moved(
                    f"the mirror no longer has {names}: run `llmkeep lock update`, or build with --resolve-apt, which uses "
                    "the present versions and pins them in the bundle's manifest"
                ) from error
            raise
        digests = {}
        for file in self.archives.glob("*.deb"):
            name, version, _ = file.stem.split("_")
            digests[f"{name}={version.replace('%3a', ':')}"] = cache.put(file)
        return digests

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["apt-get", "--config-file", str(self.config), "-qq", "-y", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
            errors="replace",
        )

    def _entry(self, source: Source) -> str:
        """The source's entry in apt's deb822 format."""
        if source.debian:
            return "\n".join(_debian_entries(source))
        fields = {
            "Types": "deb",
            "Suites": " ".join(source.suites),
            "Components": " ".join(source.components),
        }
        if source.directory:
            # Each file was compared with its stated sha256, which takes the place of a signature.
            fields |= {"URIs": f"copy:{self._local(source)}", "Suites": "./", "Trusted": "yes"}
        else:
            fields |= {"URIs": _copied(source.uri), "Signed-By": str(aptsources.keyring(source, self.tree))}
        return "".join(f"{name}: {value}\n" for name, value in fields.items() if value)

    def _local(self, source: Source) -> Path:
        """Build a local repository from a vendor's directory."""
        place = self.folder / "local" / source.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name, path in aptsources.collect(source, self.tree).items():
            shutil.copyfile(path, place / name)
            if cache.sha256(place / name) != dict(source.files)[name]:
                raise PackagesRefused(
                    FORBIDDEN, f"{path} changed while it was being copied: fetch it from the vendor again"
                )
        (place / "Packages").write_bytes(_output(["apt-ftparchive", "packages", "."], place))
        return place

    def _offers(self, source: Source) -> Iterator[aptsources.Offer]:
        form = "--format=$(SOURCESENTRY)|$(FILENAME)"
        for line in self.get("indextargets", form, "Created-By: Packages").splitlines():
            entry, file = line.split("|")
            if Path(entry.rsplit(":", 1)[0]).stem == source.name:
                index = _output(["/usr/lib/apt/apt-helper", "cat-file", file])
                yield from aptsources.offers(index.decode(errors="replace"))


class Moved(LlmkeepError):
    """The mirror has other versions than the lock."""


def resolve(
    section: dict[str, Any], known: dict[str, Deb], tree: Path = TREE
) -> tuple[dict[str, list[str]], dict[str, Deb]]:
    """Each role's packages as `name=version`, and the closure of all roles together.

    `section`: artifacts.yml's `apt`, with the roles and sources of one profile. Packages of the role `installed` that
    no source has are left out and printed. Packages that are `known` and cached are neither downloaded nor inspected
    again.
    """
    apt = Apt(section, list(section["sources"]), tree)
    rules = apt.update()
    offered = {package for package, _ in rules.versions}
    installed = section["roles"].get(additions.INSTALLED, [])
    if without := sorted(set(installed) - offered):
        print(
            f"apt: {len(without)} of {len(installed)} packages installed on hosts are in no source and cannot be updated: "
            f"{', '.join(without)}"
        )
    wanted_of = section["roles"] | {additions.INSTALLED: [name for name in installed if name in offered]}
    packages = sorted({name for names in wanted_of.values() for name in names})
    try:
        closure = apt.closure(packages)
    except LlmkeepError as error:
        held = [f"{name} has {package}" for name, package in rules.held_back(str(error))]
        if not held:
            raise
        raise PackagesRefused(
            FORBIDDEN,
            f"{error}\nThe source {', '.join(held)}, which it is not listed for: add it to the packages of that source",
        ) from error
    sources = {key: rules.source(key, digest) for key, digest in closure.items()}
    debs = {
        key: known[key]
        for key, digest in closure.items()
        if key in known
        and (known[key].sha256, known[key].apt_source) == (digest, sources[key].name)
        and cache.has(digest, known[key].size)
    }
    new = [key for key in closure if key not in debs]
    if new:
        digests = apt.download(new)
        for key in new:
            control = _output(["dpkg-deb", "--field", str(cache.blob(digests[key]))]).decode(errors="replace")
            rules.require_same(key, digests[key], control)
        with ThreadPoolExecutor() as pool:
            descriptions = pool.map(lambda key: describe(key, digests[key], sources[key]), new)
            debs |= zip(new, descriptions, strict=True)
    versions = dict(key.split("=", 1) for key in closure)
    roles = {
        role: [f"{name}={versions[name]}" for name in names] for role, names in wanted_of.items() if names
    }
    return roles, debs


def fetch(section: dict[str, Any], debs: dict[str, Deb], tree: Path = TREE) -> None:
    """Download exactly these packages into the cache; raises Moved if a source offers other versions.

    `section`: artifacts.yml's `apt`. Vendors' directories are compared with their entries even if nothing is missing.
    """
    used = {deb.apt_source for deb in debs.values()}
    for name in sorted(used & set(section["sources"])):
        source = aptsources.parse(name, section["sources"][name])
        if source.directory:
            aptsources.collect(source, tree)
            locked = {key: deb.sha256 for key, deb in debs.items() if deb.apt_source == name}
            _require_locked(
                locked,
                {key: digest for key, digest in locked.items() if digest in dict(source.files).values()},
            )
    missing = [key for key, deb in debs.items() if not cache.has(deb.sha256, deb.size)]
    if not missing:
        return
    apt = Apt(section, list(used), tree)
    apt.update()
    _require_locked({key: debs[key].sha256 for key in missing}, apt.download(missing))


def _require_locked(locked: dict[str, str], digests: dict[str, str]) -> None:
    """Refuse packages whose SHA256 differs from the lock."""
    for key, digest in locked.items():
        if digests.get(key) != digest:
            raise PackagesRefused(
                FORBIDDEN,
                f"{key} has sha256 {digests.get(key, 'of no file')}, the lock says {digest}: "
                "a published package changed; do not use it until you know why",
            )


def describe(key: str, digest: str, source: Source) -> Deb:
    """The lock's entry for a cached package. A vendor's package states its licence itself, or its source does."""
    name, version = key.split("=", 1)
    file = cache.blob(digest)
    architecture = _output(["dpkg-deb", "--field", str(file), "Architecture"]).decode().strip()
    licence, origin = _licence(file, name), "debian" if source.debian else source.name
    return Deb(
        file=f"{name}_{version.split(':')[-1]}_{architecture}.deb",
        version=version,
        sha256=digest,
        size=file.stat().st_size,
        licence=source.licence if licence == UNKNOWN_LICENCE and source.licence else licence,
        purl=f"pkg:deb/{origin}/{name}@{quote(version, safe='')}?arch={architecture}",
        apt_source=source.name,
    )


def repository(folder: Path, debs: dict[str, Deb], key: signing.Signer, expires: str) -> None:
    """pool/ and a signed dists/trixie under `folder`; apt refuses it from `expires` (an RFC 2822 date) on."""
    for deb in debs.values():
        cache.place(cache.blob(deb.sha256), folder / "pool" / deb.file)
    place = folder / "dists" / SUITE
    index = place / COMPONENT / "binary-amd64" / "Packages"
    index.parent.mkdir(parents=True)
    only_sha256 = [f"--no-{name}" for name in ("md5", "sha1", "sha512")]
    index.write_bytes(_output(["apt-ftparchive", *only_sha256, "packages", "pool"], folder))
    facts = {
        "Origin": "llmkeep",
        "Label": "llmkeep",
        "Suite": SUITE,
        "Codename": SUITE,
        "Components": COMPONENT,
        "Architectures": "amd64",
        "Acquire-By-Hash": "no",
        "Valid-Until": expires,
    }
    options = [f"--option=APT::FTPArchive::Release::{name}={value}" for name, value in facts.items()]
    release = place / "Release"
    content = _output(
        ["apt-ftparchive", *only_sha256, *options, "release", str(place.relative_to(folder))], folder
    )
    release.write_bytes(content)
    signing.sign_inline(key, release, place / "InRelease")
    release.unlink()


def _reasons(stderr: str) -> list[str]:
    """apt's error messages, one sentence per fault."""
    lines = [line.removeprefix("E: ") for line in stderr.splitlines() if line.startswith("E: ")]
    lines = [
        re.split(r" *Stack backtrace:", line)[0] for line in lines if "Some index files failed" not in line
    ]
    warnings = [
        line
        for line in stderr.splitlines()
        if line.startswith("W: ") and "signature verification failed" in line
    ]
    if warnings and any(line.endswith("is not signed.") for line in lines):
        lines += [warnings[0].removeprefix("W: ")]
    return lines or [stderr.strip() or "apt-get printed no error"]


def _copied(uri: str) -> str:
    """Copy a folder's packages into the cache; with `file:`, apt would use them in place."""
    return re.sub("^file:", "copy:", uri)


def _debian_entries(source: Source) -> Iterator[str]:
    """The machine's own mirrors of the wanted suites, with the source's components.

    Backports are on the mirror of their suite. A mirror whose age the machine does not check, such as a snapshot, is
    not checked here either.
    """
    form = "--format=$(ORIGIN)|$(RELEASE)|$(REPO_URI)|$(SIGNED_BY)"
    known: dict[str, list[tuple[str, str]]] = {}
    for line in _output(["apt-get", "indextargets", form, "Created-By: Packages"]).decode().splitlines():
        origin, suite, uri, signer = (line.split("|") + [""] * 4)[:4]
        if origin == "Debian":
            known.setdefault(suite, []).append((uri, signer))
    settings = _output(["apt-config", "shell", "OLD", "Acquire::Check-Valid-Until/b"]).decode()
    lacking = []
    for suite in source.suites:
        mirrors = known.get(suite) or known.get(suite.removesuffix("-backports"), [])
        lacking += [] if mirrors else [suite]
        for uri, signer in dict.fromkeys(mirrors):
            fields = {
                "Types": "deb",
                "URIs": _copied(uri),
                "Suites": suite,
                "Components": " ".join(source.components),
            }
            if signer.startswith("/"):
                fields["Signed-By"] = signer
            if "false" in settings:
                fields |= {"Check-Valid-Until": "no", "Check-Date": "no"}
            yield "".join(f"{name}: {value}\n" for name, value in fields.items())
    if lacking:
        raise LlmkeepError(
            f"this machine's apt has no Debian mirror for {', '.join(lacking)}: "
            "add it to /etc/apt/sources.list.d and run `apt-get update`"
        )


def _licence(file: Path, name: str) -> str:
    """The short names of a machine-readable debian/copyright (DEP 5), else NOASSERTION."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(file)], capture_output=True, check=True).stdout
    copyright_file = f"./usr/share/doc/{name}/copyright"
    text = subprocess.run(
        ["tar", "--extract", "--to-stdout", "--file=-", copyright_file],
        input=tar,
        capture_output=True,
        check=False,
    ).stdout.decode(errors="replace")
    if "Format:" not in text.split("\n", 1)[0]:
        return UNKNOWN_LICENCE
    names = re.findall(r"^License: *(\S[^\n]*)", text, re.MULTILINE)
    return printable(" AND ".join(dict.fromkeys(name.strip() for name in names))) or UNKNOWN_LICENCE


def _output(command: list[str], folder: Path | None = None) -> bytes:
    try:
        run = subprocess.run(command, capture_output=True, check=False, cwd=folder)
    except FileNotFoundError as error:
        raise LlmkeepError(f"{command[0]} is not installed: apt-get install apt-utils dpkg") from error
    if run.returncode != 0:
        raise LlmkeepError(f"{' '.join(command[:2])} failed: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout
