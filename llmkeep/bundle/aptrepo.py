"""Debian packages: resolve a closure, download exactly what the lock says, make a signed repository of it.

apt does the first two with a private state: only the suites that artifacts.yml names, no installed packages, none of
the machine's pins. Mirror, proxy and keys come from the machine's own apt settings.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmkeep.bundle import cache, signing
from llmkeep.bundle.lock import Artifact
from llmkeep.errors import LlmkeepError

SUITE, COMPONENT = "trixie", "main"


class Apt:
    """apt with a state of its own in the cache. `wanted` is artifacts.yml's `apt`."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.folder = cache.home() / "apt"
        self.archives = self.folder / "archives"
        for folder in (self.folder / "lists" / "partial", self.archives / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        (self.folder / "sources.list").write_text("\n".join(_sources(wanted)) + "\n")
        self.config = self.folder / "apt.conf"
        self.config.write_text(f"""
Dir::State "{self.folder}"; Dir::State::Lists "{self.folder}/lists";
Dir::State::status "{self.folder}/status";
Dir::Cache "{self.folder}"; Dir::Cache::archives "{self.archives}";
Dir::Etc::sourcelist "{self.folder}/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "{wanted["architecture"]}"; APT::Architectures {{ "{wanted["architecture"]}"; }};
APT::Install-Recommends "false"; APT::Sandbox::User "root"; Acquire::Languages "none"; Acquire::Retries "3";
APT::Update::Error-Mode "any";
""")

    def get(self, *arguments: str) -> str:
        """Run apt-get; a failure carries apt's own words."""
        run = subprocess.run(
            ["apt-get", "--config-file", str(self.config), "-qq", "-y", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            raise LlmkeepError(f"apt-get {arguments[0]} failed:\n{run.stderr.strip()}")
        return run.stdout

    def closure(self, packages: list[str]) -> list[str]:
        """`name=version` of everything that these packages need on a machine that has nothing."""
        found = []
        for line in self.get("install", "--print-uris", *packages).splitlines():
            name, version, _ = line.split()[1].removesuffix(".deb").split("_")
            found.append(f"{name}={version.replace('%3a', ':')}")
        return sorted(found)

    def download(self, keys: list[str]) -> dict[str, str]:
        """Download packages (`name=version`) into the cache; returns their sha256. An interrupted download is resumed."""
        try:
            self.get("install", "--download-only", "--no-remove", *keys)
        except LlmkeepError as error:
            gone = re.findall(r"Version '([^']+)' for '([^']+)' was not found", str(error))
            if gone:
                names = ", ".join(f"{name}={version}" for version, name in gone)
                raise Moved(
                    f"the mirror no longer has {names}: run `llmkeep lock update`, or build with "
                    "--resolve-apt, which pins what it finds in the bundle's manifest"
                ) from error
            raise
        found = {}
        for file in self.archives.glob("*.deb"):
            name, version, _ = file.stem.split("_")
            found[f"{name}={version.replace('%3a', ':')}"] = cache.put(file)
        return found


class Moved(LlmkeepError):
    """The mirror has other versions than the lock."""


def resolve(
    wanted: dict[str, Any], known: dict[str, Artifact]
) -> tuple[dict[str, list[str]], dict[str, Artifact]]:
    """Roles to their wanted packages as `name=version`, and the closure of all roles together.

    Packages that are `known` and in the cache are neither downloaded nor looked into again.
    """
    apt = Apt(wanted)
    apt.get("update")
    packages = sorted({name for names in wanted["roles"].values() for name in names})
    keys = apt.closure(packages)
    debs = {key: known[key] for key in keys if key in known and cache.has(known[key].sha256, known[key].size)}
    new = [key for key in keys if key not in debs]
    if new:
        digests = apt.download(new)
        with ThreadPoolExecutor() as pool:
            debs |= zip(new, pool.map(lambda key: describe(key, digests[key]), new), strict=True)
    versions = dict(key.split("=", 1) for key in keys)
    roles = {role: [f"{name}={versions[name]}" for name in names] for role, names in wanted["roles"].items()}
    return roles, debs


def fetch(wanted: dict[str, Any], debs: dict[str, Artifact]) -> None:
    """Download exactly these packages into the cache; raises Moved if the mirror has other versions."""
    missing = [key for key, deb in debs.items() if not cache.has(deb.sha256, deb.size)]
    if not missing:
        return
    apt = Apt(wanted)
    apt.get("update")
    digests = apt.download(missing)
    for key in missing:
        if digests.get(key) != debs[key].sha256:
            raise LlmkeepError(
                f"{key} has sha256 {digests.get(key)}, the lock says {debs[key].sha256}: "
                "a published package was changed; do not use it until you know why"
            )


def describe(key: str, digest: str) -> Artifact:
    """The lock's entry for a package that is in the cache."""
    name, version = key.split("=", 1)
    file = cache.blob(digest)
    architecture = _output(["dpkg-deb", "--field", str(file), "Architecture"]).decode().strip()
    return Artifact(
        file=f"{name}_{version.split(':')[-1]}_{architecture}.deb",
        version=version,
        sha256=digest,
        size=file.stat().st_size,
        licence=_licence(file, name),
        purl=f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}",
    )


def repository(folder: Path, debs: dict[str, Artifact], key: signing.Signer, expires: str) -> None:
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


def _sources(wanted: dict[str, Any]) -> list[str]:
    """One-line sources of the machine's own mirrors for the wanted suites."""
    form = "$(ORIGIN)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(SIGNED_BY)"
    lines = []
    for line in (
        _output(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).decode().split("\n")
    ):
        origin, suite, component, uri, signer = (line.split("|") + [""] * 5)[:5]
        if origin == wanted["origin"] and suite in wanted["suites"] and component == COMPONENT:
            lines.append(
                f"deb {f'[signed-by={signer}] ' if signer.startswith('/') else ''}{uri} {suite} {component}"
            )
    lacking = [suite for suite in wanted["suites"] if not any(f" {suite} " in line for line in lines)]
    if lacking:
        raise LlmkeepError(
            f"this machine's apt knows no {wanted['origin']} mirror of {', '.join(lacking)}: "
            "add it to /etc/apt/sources.list.d and run `apt-get update`"
        )
    return sorted(set(lines))


def _licence(file: Path, name: str) -> str:
    """The short names of a machine-readable debian/copyright (DEP 5), else NOASSERTION."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(file)], capture_output=True, check=True).stdout
    wanted = f"./usr/share/doc/{name}/copyright"
    text = subprocess.run(
        ["tar", "--extract", "--to-stdout", "--file=-", wanted], input=tar, capture_output=True, check=False
    ).stdout.decode(errors="replace")
    if "Format:" not in text.split("\n", 1)[0]:
        return "NOASSERTION"
    names = re.findall(r"^License: *(\S[^\n]*)", text, re.MULTILINE)
    return " AND ".join(dict.fromkeys(name.strip() for name in names)) or "NOASSERTION"


def _output(command: list[str], folder: Path | None = None) -> bytes:
    try:
        run = subprocess.run(command, capture_output=True, check=False, cwd=folder)
    except FileNotFoundError as error:
        raise LlmkeepError(f"{command[0]} is not installed: apt-get install apt-utils dpkg") from error
    if run.returncode != 0:
        raise LlmkeepError(f"{' '.join(command[:2])} failed: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout
