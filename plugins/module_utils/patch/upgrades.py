"""Newer packages for one host, and the rollback to those that it had."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import debs
from ansible_collections.llmkeep.estate.plugins.module_utils.config.debs import Call
from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import Failed

INSTALL = re.compile(r"^Inst (?P<name>\S+) (?:\[(?P<old>[^\]]+)\] )?\((?P<new>\S+) ", re.MULTILINE)
KEPT_BACK = re.compile(r"^The following packages have been kept back:\n((?: .*\n)+)", re.MULTILINE)
POLICY = re.compile(r"^(?P<name>\S+):\n  Installed: (?P<here>\S+)\n(?P<rest>(?: .*\n?)*)", re.MULTILINE)
URI = re.compile(r"^URIs: (?P<place>file:|https://[^/\s]+)(?P<path>\S*?)(?:/current)?/apt$", re.MULTILINE)
OFFERED = re.compile(r"^ +-?\d+ .* Packages$", re.MULTILINE)
OPTIONS = ("--option=Dpkg::Options::=--force-confold",)  # llmkeep's configuration stays
KEY = Path("/etc/apt/keyrings/llmkeep.pgp")
SECONDS = 3600


@dataclass(frozen=True)
class Plan:
    """What an upgrade would do. `upgrades`: versions now and then; `kept_back`: apt cannot upgrade these without removing others,
    or without new packages; `sourceless`: no source has any version.
    """

    upgrades: dict[str, tuple[str, str]]
    new: list[str]
    kept_back: list[str]
    sourceless: list[str]


def run(argv: list[str]) -> str:
    """Output of a program, both streams; Failed with its end if it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise Failed(f"{' '.join(argv[:2])} ended with {done.returncode}: {done.stdout.strip()[-600:]}")
    return done.stdout


def upgrade(new_packages: bool, *words: str) -> list[str]:
    """The command. With new packages it installs what newer versions need besides, such as the next kernel; it removes none."""
    more = ["--with-new-pkgs"] if new_packages else []
    return [*debs.APT, *OPTIONS, *words, *more, "upgrade"]


def plan(new_packages: bool, call: Call) -> Plan:
    """By apt's own simulation, from the lists that it has. Raises Failed."""
    command = [word for word in upgrade(new_packages, "--simulate") if word != "-qq"]
    printed = call(command)
    installs = [match.groupdict() for match in INSTALL.finditer(printed)]
    back = KEPT_BACK.search(printed)
    return Plan(
        {each["name"]: (each["old"], each["new"]) for each in installs if each["old"]},
        sorted(each["name"] for each in installs if not each["old"]),
        sorted(back[1].split()) if back else [],
        _sourceless(debs.versions(call), call),
    )


def _sourceless(packages: Iterable[str], call: Call) -> list[str]:
    """Packages of which no list of apt's has a version."""
    blocks = POLICY.finditer(call(["apt-cache", "policy", *packages]))
    return sorted(block["name"] for block in blocks if not OFFERED.search(block["rest"]))


@dataclass
class Previous:
    """What a host had: versions of the packages that were upgraded, names of those that came besides, the kernel that ran."""

    packages: dict[str, str]
    added: list[str]
    kernel: str

    def saved(self) -> dict[str, Any]:
        return asdict(self)


def repositories(sources: Path, serials: Iterable[int]) -> list[str]:
    """URLs of the repositories of the mirror's bundles, by that of the one in use. Raises Failed."""
    uri = URI.search(sources.read_text())
    if not uri:
        raise Failed(f"{sources} is not as role base writes it: run `llmkeep site --tags base`")
    # The control node reads them from its disk.
    pattern = "{0}/{1}/apt" if uri["place"] == "file:" else "{0}/serials/{1}/apt"
    return [
        pattern.format(f"{uri['place']}{uri['path']}", serial) for serial in sorted(serials, reverse=True)
    ]


def older_sources(urls: list[str], folder: Path, key: Path) -> Path | None:
    """An apt configuration whose sources are earlier bundles, at these URLs, signed by the key."""
    if not urls:
        return None
    for place in ("lists/partial", "archives/partial"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    lines = [f"deb [signed-by={key}] {url} trixie main\n" for url in urls]
    (folder / "sources.list").write_text("".join(lines))
    config = folder / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{folder}/sources.list"; Dir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State::Lists "{folder}/lists"; Dir::Cache "{folder}"; Acquire::Check-Valid-Until "false";\n'
    )
    return config


def keep(
    previous: Previous, folder: Path, archives: Path, urls: list[str], call: Call, key: Path = KEY
) -> list[str]:
    """Copy the packages of before into `folder`; those that cannot be had, neither from apt's archives nor from the mirror's
    bundles. Nothing else on the host changes.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lacking: list[str] = debs.keep(previous.packages, folder, archives, call)
    if lacking and (config := older_sources(urls, folder / "apt", key)):
        call(["apt-get", "-qq", "-c", str(config), "-o", "APT::Sandbox::User=root", "update"])
        packages = {
            name: version for name, version in previous.packages.items() if f"{name} {version}" in lacking
        }
        lacking = debs.keep(packages, folder, archives, call, config)
    return lacking
