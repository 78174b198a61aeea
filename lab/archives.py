"""Debian's archives for trixie, with the sources and settings of this machine's own apt."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.errors import LabError

SUITES = ("trixie", "trixie-updates", "trixie-security")
BACKPORTS = "trixie-backports"


def deb822_sources(paragraphs: str) -> Iterator[str]:
    """The paragraphs of a deb822 file for Debian's own trixie archives."""
    for paragraph in re.split(r"\n[ \t]*\n", paragraphs):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", "\n".join(lines), re.MULTILINE))
        suites = [suite for suite in fields.get("Suites", "").split() if suite in SUITES]
        uris = [uri for uri in fields.get("URIs", "").split() if not uri.startswith(("file:", "cdrom:"))]
        if (
            suites
            and uris
            and "deb" in fields.get("Types", "").split()
            and fields.get("Enabled", "yes") != "no"
        ):
            keyring = fields.get("Signed-By", "/usr/share/keyrings/debian-archive-keyring.pgp")
            yield (
                f"Types: deb\nURIs: {' '.join(uris)}\nSuites: {' '.join(suites)}\n"
                f"Components: main\nSigned-By: {keyring}\n"
            )


def one_line_sources(text: str) -> Iterator[str]:
    """The same from a one-line-style sources.list."""
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[[^]]*\]\s+)?((?!file:|cdrom:)\S+)\s+(\S+)\s", line)
        if match and match[2] in SUITES:
            yield from deb822_sources(f"Types: deb\nURIs: {match[1]}\nSuites: {match[2]}\n")


def machine_sources(etc_apt: Path = Path("/etc/apt")) -> str:
    """This machine's own Debian archives, in deb822; LabError if it has none for trixie."""
    entries: list[str] = []
    for file in sorted([*etc_apt.glob("sources.list"), *etc_apt.glob("sources.list.d/*")]):
        if file.suffix == ".sources":
            entries += deb822_sources(file.read_text(encoding="utf-8"))
        elif file.suffix == ".list":
            entries += one_line_sources(file.read_text(encoding="utf-8"))
    if not entries:
        raise LabError(
            f"{etc_apt} names no archive with the suite trixie: this machine cannot install Debian 13"
        )
    return "\n".join(dict.fromkeys(entries))


def acquire_options() -> list[str]:
    """This machine's apt settings for downloads (proxies, timeouts)."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    pattern = re.compile(
        r"Acquire::(https?::(?!User-Agent)|Check-|Retries|ForceIPv|Max-FutureTime)\S* \"[^\"]+\";"
    )
    return [line for line in dump.splitlines() if pattern.match(line)]


class Sources:
    """Debian's source packages, including backports, independent of the suites in this machine's apt configuration."""

    def __init__(self, scratch: Path) -> None:
        """Download the package lists into the folder `scratch`; LabError if no archive answers."""
        self.scratch = scratch
        for folder in ("sources", "lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True, exist_ok=True)
        own = machine_sources()
        main = [
            each for each in own.split("\n\n") if re.search(r"^Suites:.*\btrixie( |$)", each, re.MULTILINE)
        ]
        backports = [
            re.sub(r"^Suites:.*$", f"Suites: {BACKPORTS}", each, flags=re.MULTILINE) for each in main
        ]
        file = scratch / "sources" / "debian.sources"
        file.write_text("\n".join([own, *backports]), encoding="utf-8")
        try:
            self.apt("apt-get", "-qq", "update")
        except LabError:  # a mirror of one's own may carry no backports
            file.write_text(own, encoding="utf-8")
            self.apt("apt-get", "-qq", "update")

    def apt(self, *command: str) -> str:
        """Output of an apt command that uses these lists; LabError with its message if it fails."""
        folders = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": self.scratch / "sources",
            "Dir::State::Lists": self.scratch / "lists",
            "Dir::Cache": self.scratch / "cache",
            "APT::Sandbox::User": "root",
        }
        options = [part for name, value in folders.items() for part in ("-o", f"{name}={value}")]
        done = subprocess.run(
            [*command, *options], cwd=self.scratch, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise LabError(f"`{' '.join(command)}` ended with {done.returncode}:\n  {done.stderr.strip()}")
        return done.stdout

    def versions(self, pattern: str) -> dict[str, str]:
        """Newest version of each package whose whole name matches the pattern."""
        names = self.apt("apt-cache", "pkgnames").split()
        versions = {}
        for name in sorted(name for name in names if re.fullmatch(pattern, name)):
            madison = self.apt("apt-cache", "madison", name).splitlines()
            versions[name] = madison[0].split("|")[1].strip()
        return versions

    def download(self, package: str, version: str) -> Path:
        """The package's file, verified by apt."""
        self.apt("apt-get", "-qq", "download", f"{package}={version}")
        [archive] = self.scratch.glob(f"{package}_*.deb")
        return archive
