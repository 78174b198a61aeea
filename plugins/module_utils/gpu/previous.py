"""The driver set that ran before an upgrade, kept so that it can be had again without the mirror and without a build.

Debian's packages of a driver replace one another, and dkms removes the modules of the version that goes. So packages and modules
are copied before anything changes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import dkms, kernels

DKMS_STATUS = re.compile(
    r"^(?P<name>[^/\s]+)/(?P<version>[^,\s]+), (?P<kernel>[^,\s]+), \w+: installed", re.MULTILINE
)
Call = Callable[[list[str]], str]


@dataclass(frozen=True)
class Previous:
    """What ran. `packages`: versions of everything in the driver's version, and of what else was held, but for kernels,
    which lie beside each other. `held`: what apt was told to leave alone.
    """

    name: str  # of the set; of an unknown one, driver and version
    kernel: str
    driver: str  # as in dkms.conf
    version: str
    packages: dict[str, str]
    held: list[str]

    def __str__(self) -> str:
        return f"{self.name} ({self.driver} {self.version} on {self.kernel})"


def installed_drivers(told: str) -> list[tuple[str, str, str]]:
    """Name, version and kernel of each driver that `dkms status` calls installed."""
    return [(found["name"], found["version"], found["kernel"]) for found in DKMS_STATUS.finditer(told)]


def current(kernel: str, sets: list[dict[str, Any]], places: dkms.Places, call: Call) -> Previous:
    """What is installed for a kernel, by the names of the estate's sets. Failed if that is not exactly one driver."""
    names = {each["dkms"]["name"] for each in sets}
    told = call(["dkms", "status", *places.options()])
    found = [each for each in installed_drivers(told) if each[0] in names and each[2] == kernel]
    if len(found) != 1:
        seen = ", ".join(f"{name} {version}" for name, version, _ in found) or "no driver"
        raise dkms.Failed(
            f"dkms has {seen} of gpu_sets installed for the kernel {kernel}, so there is no way back to one set: bring"
            " the host to a set of llmkeep by `llmkeep site --tags gpu` first"
        )
    name, version, _ = found[0]
    known = [each["name"] for each in sets if each["dkms"]["name"] == name and each["driver"] == version]
    held = call(["apt-mark", "showhold"]).split()
    packages = {}
    for line in call(
        ["dpkg-query", "--show", "--showformat=${db:Status-Abbrev}\\t${Package}\\t${Version}\\n"]
    ).splitlines():
        status, package, of = line.split("\t")
        equal = of.rpartition(":")[2].startswith(f"{version}-")
        if (
            status.startswith(("ii", "hi"))
            and (equal or package in held)
            and not package.startswith("linux-")
        ):
            packages[package] = of
    return Previous(known[0] if known else f"{name} {version}", kernel, name, version, packages, sorted(held))


def keep(previous: Previous, places: dkms.Places, call: Call, archives: Path) -> None:
    """Copy its packages and modules below `places.kept`. Failed if a package of that version cannot be had any more."""
    folder = places.kept / "previous"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    driver = dkms.Driver(previous.driver, previous.version, previous.kernel)
    shutil.copytree(places.of(driver), folder / "modules")
    for package, version in previous.packages.items():
        # apt writes the colon of an epoch as %3a.
        cached = sorted(archives.glob(f"{package}_{quote(version, safe='~+').replace('%3A', '%3a')}_*.deb"))
        if cached:
            shutil.copy(cached[0], folder)
            continue
        command = f'cd "{folder}" && exec apt-get -qq -o APT::Sandbox::User=root download "$1"'
        try:
            call(["sh", "-c", command, "download", f"{package}={version}"])
        except dkms.Failed:
            raise dkms.Failed(
                f"{package} {version}, which is installed, is neither in {archives} nor on the mirror, so there is no way back;"
                f" nothing was changed. Put its .deb into {archives}, from the bundle that it came with"
            ) from None


def restore(
    previous: Previous, running: str, places: dkms.Places, call: Call, boot: Path = Path("/boot")
) -> bool:
    """Packages, modules, holds and GRUB's default of before; whether anything changed. Needs neither mirror nor compiler."""
    folder = places.kept / "previous"
    wrong = [package for package, version in previous.packages.items() if _version(package, call) != version]
    if wrong:
        debs = [str(path) for package in wrong for path in folder.glob(f"{package}_*.deb")]
        apt = ["apt-get", "-qq", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
        call(["dpkg", "--force-confold", "--configure", "-a"])  # where the upgrade was interrupted
        call([*apt, "--allow-downgrades", "--allow-change-held-packages", "install", *debs])
    driver = dkms.Driver(previous.driver, previous.version, previous.kernel)
    lacking = not dkms.is_installed(driver, None, places)
    if lacking:
        # As they were signed; role gpu's checks verify that.
        shutil.copytree(folder / "modules", places.proven(driver), dirs_exist_ok=True)
        dkms.install(driver, None, places)
    (places.kept / "kernel").write_text(f"{previous.kernel}\n")  # for the role's checks
    others = sorted(set(call(["apt-mark", "showhold"]).split()) - set(previous.held))  # the new set's
    held = kernels.hold(others, free=True, call=call) + kernels.hold(previous.held, call=call)
    chose = make_default(previous.kernel, running, boot, call)
    return bool(wrong) or lacking or bool(held) or chose


def _version(package: str, call: Call) -> str:
    """The version that is installed; empty where it is not, or only its configuration is left."""
    try:
        told = call(["dpkg-query", "--show", "--showformat=${db:Status-Abbrev}\\t${Version}", package])
    except dkms.Failed:
        return ""
    status, _, version = told.partition("\t")
    return version if status.startswith(("ii", "hi")) else ""


def make_default(kernel: str, running: str, boot: Path, call: Call) -> bool:
    """Have GRUB boot a kernel by default, and no other one once; whether that took a change. Failed if GRUB does not know it."""
    if not kernels.boots_itself(boot, running):
        return False
    entries = kernels.menu((boot / "grub/grub.cfg").read_text())
    if kernel not in entries:
        raise dkms.Failed(
            f"GRUB has no kernel {kernel} in its menu, only {', '.join(entries) or 'none'}: install linux-image-{kernel}"
        )
    chosen = kernels.chosen(call(["grub-editenv", "list"]))
    if once := chosen.get("next_entry"):
        call(["grub-editenv", "-", "unset", "next_entry"])
    if wrong := chosen.get("saved_entry") != entries[kernel]:
        call(["grub-set-default", entries[kernel]])
    return bool(once) or wrong


def as_saved(previous: Previous) -> dict[str, Any]:
    return asdict(previous)


def run(argv: list[str]) -> str:
    """Output of a program. Failed with its words if it fails, or is missing."""
    try:
        told: str = dkms.run(argv, {"DEBIAN_FRONTEND": "noninteractive"})
        return told
    except FileNotFoundError:
        raise dkms.Failed(f"{argv[0]} is not on this host: it has no driver of llmkeep yet") from None


def running_kernel() -> str:
    return os.uname().release
