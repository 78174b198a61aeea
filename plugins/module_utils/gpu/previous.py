"""The driver set that ran before an upgrade, kept so that it can be had again without the mirror and without a build.

Debian's packages of a driver replace one another, and dkms removes the modules of the version that goes. So packages and modules
are copied before anything changes.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import debs
from ansible_collections.llmkeep.estate.plugins.module_utils.config.debs import Call
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import dkms, kernels

DKMS_STATUS = re.compile(
    r"^(?P<name>[^/\s]+)/(?P<version>[^,\s]+), (?P<kernel>[^,\s]+), \w+: installed", re.MULTILINE
)


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


def installed_drivers(output: str) -> list[tuple[str, str, str]]:
    """Name, version and kernel of each driver that `dkms status` calls installed."""
    return [(match["name"], match["version"], match["kernel"]) for match in DKMS_STATUS.finditer(output)]


def current(kernel: str, sets: list[dict[str, Any]], places: dkms.Places, call: Call) -> Previous:
    """What is installed for a kernel, by the names of the estate's sets. Failed if that is not exactly one driver."""
    names = {each["dkms"]["name"] for each in sets}
    output = call(["dkms", "status", *places.options()])
    drivers = [each for each in installed_drivers(output) if each[0] in names and each[2] == kernel]
    if len(drivers) != 1:
        present = ", ".join(f"{name} {version}" for name, version, _ in drivers) or "no driver"
        raise dkms.Failed(
            f"dkms has {present} of gpu_sets installed for the kernel {kernel}, so there is no rollback to one set: first "
            "install a set of llmkeep with `llmkeep site --tags gpu`"
        )
    name, version, _ = drivers[0]
    known = [each["name"] for each in sets if each["dkms"]["name"] == name and each["driver"] == version]
    held = call(["apt-mark", "showhold"]).split()
    packages = {
        package: of
        for package, of in debs.versions(call).items()
        if (of.rpartition(":")[2].startswith(f"{version}-") or package in held)
        and not package.startswith("linux-")
    }
    return Previous(known[0] if known else f"{name} {version}", kernel, name, version, packages, sorted(held))


def keep(previous: Previous, places: dkms.Places, call: Call, archives: Path) -> None:
    """Copy its packages and modules below `places.builds`. Failed if a package of that version cannot be had any more."""
    folder = places.builds / "previous"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    driver = dkms.Driver(previous.driver, previous.version, previous.kernel)
    shutil.copytree(places.of(driver), folder / "modules")
    if lacking := debs.keep(previous.packages, folder, archives, call):
        raise dkms.Failed(
            f"{', '.join(lacking)}: installed, but neither in {archives} nor on the mirror, so there is no rollback; "
            f"nothing was changed. Put the .deb from its bundle into {archives}"
        )


def restore(
    previous: Previous, running: str, places: dkms.Places, call: Call, boot: Path = Path("/boot")
) -> bool:
    """Packages, modules, holds and GRUB's default of before; whether anything changed. Needs neither mirror nor compiler."""
    folder = places.builds / "previous"
    changed = debs.restore(previous.packages, [], folder, call)
    driver = dkms.Driver(previous.driver, previous.version, previous.kernel)
    lacking = not dkms.is_installed(driver, None, places)
    if lacking:
        # As they were signed; role gpu's checks verify that.
        shutil.copytree(folder / "modules", places.proven(driver), dirs_exist_ok=True)
        dkms.install(driver, None, places)
    (places.builds / "kernel").write_text(f"{previous.kernel}\n")  # for the role's checks
    others = sorted(set(call(["apt-mark", "showhold"]).split()) - set(previous.held))  # the new set's
    held = kernels.hold(others, free=True, call=call) + kernels.hold(previous.held, call=call)
    chose = kernels.make_default(previous.kernel, running, boot, call)
    return changed or lacking or bool(held) or chose


def as_saved(previous: Previous) -> dict[str, Any]:
    return asdict(previous)


def run(argv: list[str]) -> str:
    """Output of a program. Failed with its words if it fails, or is missing."""
    try:
        output: str = dkms.run(argv, {"DEBIAN_FRONTEND": "noninteractive"})
        return output
    except FileNotFoundError:
        raise dkms.Failed(f"{argv[0]} is not on this host: it has no driver of llmkeep yet") from None


def running_kernel() -> str:
    return os.uname().release
