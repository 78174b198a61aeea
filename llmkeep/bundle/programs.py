"""Programs that no distribution packages (artifacts.yml, `programs`): from the cache, a mirror folder, or their source.

The program's sha256 is compared with the lock each time before its path is returned. A build from source runs `go` with
the recipe in artifacts.yml; this has not been tested, since no machine with `go` was available.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmkeep.bundle import cache, lock
from llmkeep.bundle.lock import Artifact
from llmkeep.errors import LlmkeepError

MINUTES = 20  # for a build from source; two cores need one or two


class Unavailable(Exception):
    """One source of a program is unavailable. The message says which and why, on one line."""


def find(name: str, mirror: Path | None = None) -> Path | None:
    """Path in the cache of the executable that the lock names; None if it is unavailable, with the reasons printed.

    MIRROR: a folder of compressed programs; None: the one that LLMKEEP_MIRROR names, if any.
    """
    pinned, entries = lock.load().programs, lock.catalogue()["programs"]
    if name not in pinned:
        raise LlmkeepError(
            f"artifacts.lock.yml has no program {name!r}, only {sorted(pinned)}: "
            "choose one of these, or run `llmkeep lock update --only programs`"
        )
    program = pinned[name]
    if cache.has(program.sha256, program.size) and cache.sha256(cache.blob(program.sha256)) == program.sha256:
        return _executable(program.sha256)
    cache.blob(program.sha256).unlink(missing_ok=True)  # what lies there was damaged
    digest, reasons = _obtain(name, entries[name], mirror, program.sha256)
    if digest:
        return _executable(digest)
    print(f"{name} {program.version} is not available: {reasons}", file=sys.stderr, flush=True)
    return None


def resolve(name: str, entry: dict[str, Any], old: Artifact | None) -> Artifact:
    """The lock's entry for a program of artifacts.yml, from the mirror folder or by a build.

    If neither is possible and artifacts.yml still names the version of OLD, the old entry stays.
    """
    purl = package_url(entry)
    digest, reasons = _obtain(name, entry, None, None)
    if digest:
        size = cache.blob(digest).stat().st_size
        print(f"{name}: {entry['version']}, {size / 1e6:.0f} MB, sha256 {digest}")
        return Artifact(name, entry["version"].removeprefix("v"), digest, size, entry["licence"], purl)
    if old and old.purl == purl:
        print(f"{name}: {entry['version']} kept: {reasons}")
        return old
    raise LlmkeepError(f"{name} {entry['version']} is not available: {reasons}: "
                    "set LLMKEEP_MIRROR to a folder that has it, or install Go")  # fmt: skip


def package_url(entry: dict[str, Any]) -> str:
    """Package URL of a program of artifacts.yml: a Go module, or a package of Maven Central or Debian."""
    if "maven" in entry:
        return f"pkg:maven/{entry['maven']}@{entry['version']}"
    if "deb" in entry:
        return f"pkg:deb/debian/{entry['deb']}@{entry['version']}"
    return f"pkg:golang/{entry['module']}@{entry['version']}"


def _obtain(
    name: str, entry: dict[str, Any], mirror: Path | None, digest: str | None
) -> tuple[str | None, str]:
    """Get the program with this DIGEST (None: any) into the cache. Returns its sha256, or None, and the reasons."""
    reasons = []
    for way in (_from_mirror, _from_source):
        with tempfile.TemporaryDirectory(dir=cache.home()) as folder:
            try:
                made = way(name, entry, Path(folder), mirror)
            except Unavailable as reason:
                reasons.append(str(reason))
                continue
            if digest in (None, actual := cache.sha256(made)):
                return cache.put(made), ""
            reasons.append(f"{way.__name__[6:]}: sha256 is {actual}, the lock says {digest}")
    return None, "; ".join(reasons)


def _from_mirror(_: str, entry: dict[str, Any], folder: Path, mirror: Path | None) -> Path:
    """Unpack the mirror folder's file."""
    mirror = mirror or (Path(named) if (named := os.environ.get("LLMKEEP_MIRROR")) else None)
    if not mirror:
        raise Unavailable("mirror: neither --mirror nor LLMKEEP_MIRROR names a folder")
    packed, made = mirror / entry["mirror"], folder / "unpacked"
    if not packed.is_file():
        raise Unavailable(f"mirror: there is no {packed}")
    if not shutil.which("zstd"):
        raise Unavailable("mirror: zstd is not installed (apt-get install zstd)")
    _call(["zstd", "-d", "-q", "-o", str(made), str(packed)], folder, "mirror")
    return made


def _from_source(name: str, entry: dict[str, Any], folder: Path, _: Path | None) -> Path:
    """Build it by the recipe; proxy and checksum database are those of the machine's own Go settings."""
    if "go" not in entry:
        raise Unavailable("source: artifacts.yml has no recipe that builds it")
    if not shutil.which("go"):
        raise Unavailable("source: there is no `go` on PATH")
    (folder / "go.mod").write_text(
        f"module build\n\ngo {entry['toolchain'].removeprefix('go')}\n\nrequire {entry['module']} {entry['version']}\n"
    )
    print(f"{name}: building {entry['module']}@{entry['version']} …", flush=True)
    settings = {
        "CGO_ENABLED": "0",
        "GOARCH": "amd64",
        "GOBIN": str(folder),
        "GOFLAGS": "-buildvcs=false",
        "GOOS": "linux",
        "GOTOOLCHAIN": entry["toolchain"],
    }
    _call(["go", *entry["go"]], folder, "source", os.environ | settings)
    return folder / name


def _call(command: list[str], folder: Path, way: str, environment: dict[str, str] | None = None) -> None:
    """Run a command; the last line of its output becomes the reason of a failure."""
    try:
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=MINUTES * 60
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{way}: `{shlex.join(command[:2])}` took more than {MINUTES} minutes") from error
    if run.returncode != 0:
        words = run.stderr.strip().splitlines() or ["it printed nothing"]
        raise Unavailable(f"{way}: `{shlex.join(command[:2])}` exited {run.returncode}: {words[-1]}")


def _executable(digest: str) -> Path:
    path = cache.blob(digest)
    path.chmod(0o555)
    return path


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep program NAME`."""
    parser = subparsers.add_parser(
        "program", help="print the path of a locked program; exit code 1 if it is not available"
    )
    parser.add_argument("name")
    parser.add_argument("--mirror", type=Path, help="default: the variable LLMKEEP_MIRROR")
    parser.set_defaults(run=_find)


def _find(arguments: argparse.Namespace) -> int:
    with cache.alone():
        path = find(arguments.name, arguments.mirror)
    if path:
        print(path)
    return 0 if path else 1
