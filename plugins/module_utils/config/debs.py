"""Debian packages of a host as they are, kept so that they can be had again, whatever the mirror has by then."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from ansible_collections.llmkeep.estate.plugins.module_utils.config.rollout import Failed

Call = Callable[
    [list[str]], str
]  # the output of a program; raises Failed, or one of its kinds, where it fails
APT = ("apt-get", "-qq", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300")
SHOW = ("dpkg-query", "--show", "--showformat=${db:Status-Abbrev}\\t${Package}\\t${Version}\\n")


def versions(call: Call) -> dict[str, str]:
    """The installed packages, also those on hold, with their versions."""
    lines = [line.split("\t") for line in call([*SHOW]).splitlines()]
    return {package: version for status, package, version in lines if status.startswith(("ii", "hi"))}


def keep(
    packages: Mapping[str, str], folder: Path, archives: Path, call: Call, config: Path | None = None
) -> list[str]:
    """Copy these packages, by their versions, into an existing folder; returns those that are neither there nor in `archives`,
    nor in a source of apt's. `config`: an apt configuration with other sources.
    """
    lacking = []
    for package, version in packages.items():
        # apt writes the colon of an epoch as %3a.
        name = f"{package}_{quote(version, safe='~+').replace('%3A', '%3a')}_*.deb"
        if any(folder.glob(name)):
            continue
        if cached := sorted(archives.glob(name)):
            shutil.copy(cached[0], folder)
            continue
        options = ["-c", str(config)] if config else []
        command = f'cd "{folder}" && exec apt-get "$@"'
        words = [
            "download",
            "-qq",
            *options,
            "-o",
            "APT::Sandbox::User=root",
            "download",
            f"{package}={version}",
        ]
        try:
            call(["sh", "-c", command, *words])
        except Failed:
            lacking.append(f"{package} {version}")
    return lacking


def restore(packages: Mapping[str, str], added: list[str], folder: Path, call: Call) -> bool:
    """Have these versions of packages from the folder, and none of those that were added; whether that took a change."""
    there = versions(call)
    wrong = [package for package, version in packages.items() if there.get(package) != version]
    gone = [f"{package}-" for package in added if package in there]
    if wrong or gone:
        files = [str(path) for package in wrong for path in folder.glob(f"{package}_*.deb")]
        call(["dpkg", "--force-confold", "--configure", "-a"])  # where it was interrupted
        call([*APT, "--allow-downgrades", "--allow-change-held-packages", "install", *files, *gone])
    return bool(wrong or gone)
