"""What is installed on a host, and which units run it, by dpkg, by Python's own records and by /proc. It changes nothing."""

from __future__ import annotations

import csv
import email.parser
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import components
from ansible_collections.llmkeep.estate.plugins.module_utils.config.debs import Call
from ansible_collections.llmkeep.estate.plugins.module_utils.patch import services

# Before /usr was merged, dpkg's lists named /lib and /bin.
UNMERGED = re.compile(r"^/(?=(?:lib\w*|s?bin)/)")
# Files that a process maps where it uses them. A package without any is used by what cannot be seen here.
NATIVE = re.compile(r"\.so(?:\.|$)|/s?bin/|/libexec/|/systemd/|/vmlinuz-")
SCRIPTS = "llmweb/static/vendor/*.js"
KERNEL = "kernel"  # in place of a unit


def release(path: Path) -> str:
    """`ID VERSION_CODENAME` of os-release, as `debian trixie`."""
    fields = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return " ".join(fields.get(name, "").strip("'\"") for name in ("ID", "VERSION_CODENAME")).strip()


def visible(proc: Path) -> bool:
    """Whether the files that other users' processes map can be read."""
    try:
        return bool((proc / "1/maps").read_text(errors="replace"))
    except OSError:
        return False


def users(mapped: dict[str, set[tuple[str, bool]]]) -> dict[str, set[str]]:
    """Units by the file that they have mapped, whether or not it was replaced."""
    by_path: dict[str, set[str]] = {}
    for unit, files in mapped.items():
        for path, _ in files:
            by_path.setdefault(path, set()).add(unit)
    return by_path


def packages(call: Call, info: Path, running: str, units: dict[str, set[str]]) -> list[list[Any]]:
    """Debian's packages: name, version, source, its version, units. The last is None where no use can be seen.

    INFO: dpkg's lists of files; RUNNING: the kernel's release.
    """
    used: dict[str, set[str]] = {}
    native: set[str] = set()
    for path in info.glob("*.list"):
        name = path.name.removesuffix(".list").partition(":")[0]
        for line in path.read_text(errors="replace").splitlines():
            file = UNMERGED.sub("/usr/", line)
            if file in units:
                used.setdefault(name, set()).update(units[file])
            elif name not in native and NATIVE.search(file):
                native.add(name)
    used.setdefault(f"linux-image-{running}", set()).add(KERNEL)
    rows: list[list[Any]] = []
    for name, version, _, source, own in components.packages(call):
        services = sorted(used.get(name, ()))
        rows.append([name, version, source, own, services if services or name in native else None])
    return rows


def environments(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Python environments in use, each with its site-packages: those that a link right below a program's folder, or in its
    folder `units`, leads to. Older releases beside them are not.
    """
    homes = {
        link.resolve()
        for program in folder.glob("*")
        for link in (*program.glob("*"), *program.glob("units/*"))
        if link.is_symlink() and link.resolve().is_relative_to(program)
    }
    for home in sorted(homes):
        for site in sorted(home.glob("lib/python3*/site-packages")):
            yield home, site


def distributions(folder: Path, units: dict[str, set[str]]) -> list[list[Any]]:
    """Python's distributions: name, version, environment, units; as `packages`."""
    rows: list[list[Any]] = []
    for home, site in environments(folder):
        for metadata in sorted(site.glob("*.dist-info/METADATA")):
            fields = email.parser.HeaderParser().parsestr(metadata.read_text(errors="replace"))
            record = metadata.with_name("RECORD")
            files = _recorded(site, record) if record.exists() else []
            used = sorted({unit for file in files for unit in units.get(file, ())})
            native = any(NATIVE.search(file) for file in files if file.startswith(str(site)))
            rows.append([str(fields["Name"]), str(fields["Version"]), str(home), used if native else None])
    return rows


def _recorded(site: Path, record: Path) -> list[str]:
    """Paths of a distribution's files."""
    with record.open(newline="", errors="replace") as file:
        return [os.path.normpath(site / row[0]) for row in csv.reader(file) if row]


def scripts(folder: Path) -> list[list[str]]:
    """Scripts of the pages that others wrote: file name, SHA-256, environment."""
    return [
        [path.name, hashlib.sha256(path.read_bytes()).hexdigest(), str(home)]
        for home, site in environments(folder)
        for path in sorted(site.glob(SCRIPTS))
    ]


def replaced(mapped: dict[str, set[tuple[str, bool]]]) -> list[str]:
    """Units that run replaced files: what they run is not what is installed. Without those that end with their session."""
    return sorted(
        unit
        for unit, files in mapped.items()
        if any(deleted for _, deleted in files) and not services.LEFT.fullmatch(unit)
    )
