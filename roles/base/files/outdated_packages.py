"""Installed packages that are older than the bundle's, according to apt's package list, as the finding `current`.

A held package is named but is not a failure: role gpu holds a driver and its kernel, and operators hold others.
"""

import json
import re
import subprocess
from pathlib import Path

LISTS = Path("/var/lib/apt/lists")
SHOWN = 10
# Otherwise apt-cache would write its caches.
NO_CACHE_FILES = ["--option=Dir::Cache::pkgcache=", "--option=Dir::Cache::srcpkgcache="]
FORMAT = "--showformat=${db:Status-Want} ${db:Status-Status} ${binary:Package}\n"
OFFERED = re.compile(r"^ +-?\d+ .* Packages$", re.MULTILINE)
VERSIONS = re.compile(r"\n  Installed: (\S+)\n  Candidate: (\S+)")


def output(*argv: str) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


def installed_packages() -> dict[str, bool]:
    """By name: whether it is held."""
    lines = [line.split() for line in output("dpkg-query", "--show", FORMAT).splitlines()]
    return {
        name: wish == "hold" for wish, state, name in lines if state not in ("not-installed", "config-files")
    }


def offered_packages(names: list[str]) -> dict[str, tuple[str, str]]:
    """By name: the installed version, and the one that apt would install; packages that are in no list are left out."""
    blocks = re.split(r"^(?=\S)", output("apt-cache", *NO_CACHE_FILES, "policy", *names), flags=re.MULTILINE)
    return {
        block.partition(":\n")[0]: (versions[1], versions[2])
        for block in blocks
        if OFFERED.search(block) and (versions := VERSIONS.search(block))
    }


def listed(packages: dict[str, tuple[str, str]]) -> str:
    words = [f"{name} {here} < {offered}" for name, (here, offered) in sorted(packages.items())]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def list_date() -> str:
    releases = "\n".join(path.read_text() for path in LISTS.glob("*InRelease"))
    return ", ".join(re.findall(r"^Date: (.*)", releases, re.MULTILINE)) or "an unknown date"


def finding() -> tuple[bool, str]:
    """Whether each package is current, and what was compared."""
    holds = installed_packages()
    offers = offered_packages([*holds])
    if not offers:
        return (
            False,
            f"apt has no package list with any of the {len(holds)} installed packages. Run apt-get update on this host",
        )
    behind = {name: versions for name, versions in offers.items() if versions[0] != versions[1]}
    older = {name: versions for name, versions in behind.items() if not holds[name]}
    held = {name: versions for name, versions in behind.items() if holds[name]}
    words = f"{len(older)} of {len(offers)} packages are older than in the bundle of {list_date()}"
    if older:
        words += f": {listed(older)}. Upgrade this host: docs/operate/patch.md"
    if held:
        words += f"; held: {listed(held)}"
    if others := len(holds) - len(offers):
        words += f"; not in the bundle, so without updates: {others}"
    return not older, words


def main() -> None:
    ok, observed = finding()
    print(json.dumps({"checks": {"current": {"ok": ok, "observed": observed}}}))


if __name__ == "__main__":
    main()
