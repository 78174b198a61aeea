"""A Python environment of a bundle's wheels, unpacked by PyPA's `installer`: without index, resolver or build.

`installer` and `packaging` are Debian's, python3-installer and python3-packaging, and imported where they are used: a host
has them once its role's packages are installed.
"""

from __future__ import annotations

import re
import sysconfig
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

# Compiled where it is first imported: no host runs tests, and each loads one of some 400 architectures.
WITHOUT_BYTECODE = re.compile(r"/site-packages/(.*/tests/|transformers/models/(?!auto/)[^/]+/)")
# By the source's hash and not its time, so that two installations are equal; unchecked at a start, since only root changes
# either. The paths end with NUL. Wheels have templates of code that no Python compiles.
COMPILE = """
import py_compile, sys
for path in sys.stdin.read().split("\\0")[:-1]:
    try:
        py_compile.compile(path, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    except py_compile.PyCompileError:
        pass
"""


def unpack(wheel: Path, environment: Path) -> None:
    """Install a wheel whose hash was verified, as pip does; Refused where a file differs from the wheel's RECORD."""
    from installer import install
    from installer.destinations import SchemeDictionaryDestination
    from installer.exceptions import InstallerError
    from installer.sources import WheelFile

    class Destination(SchemeDictionaryDestination):  # type: ignore[misc]
        """Of a file that wheels share, as NVIDIA's do, the later one's stays, as with pip."""

        def write_to_fs(self, scheme: str, path: str, stream: BinaryIO, is_executable: bool) -> Any:
            Path(self.scheme_dict[scheme], path).unlink(missing_ok=True)
            return super().write_to_fs(scheme, path, stream, is_executable)

    bases = dict.fromkeys(("base", "platbase", "installed_base", "installed_platbase"), str(environment))
    scheme = sysconfig.get_paths("venv", bases)
    with zipfile.ZipFile(wheel) as archive:
        source = WheelFile(archive)
        headers = Path(scheme["include"]).parent / "site" / Path(scheme["include"]).name / source.distribution
        try:
            source.validate_record()
            for name in archive.namelist():
                if name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise Refused(
                        f"{wheel.name} has {name!r}, outside of an environment: do not use this bundle"
                    )
            target = Destination(
                {**scheme, "headers": str(headers)}, str(environment / "bin/python"), "posix"
            )
            install(source, target, {"INSTALLER": b"llmkeep\n"})
        except (InstallerError, WheelFile.validation_error) as problem:
            raise Refused(f"{wheel.name} cannot be installed: {problem}; build the bundle again") from None


def sources(environment: Path) -> str:
    """What COMPILE reads: the modules whose bytecode an environment has from the beginning."""
    files = sorted(str(path) for path in environment.glob("lib/python*/site-packages/**/*.py"))
    return "".join(f"{path}\0" for path in files if not WITHOUT_BYTECODE.search(path))


def faults(wheels: Iterable[str], path: list[str]) -> list[str]:
    """What `pip check` would say of wheels, by file name, and of all that they need; `path` is the environment's sys.path."""
    from packaging.requirements import Requirement
    from packaging.tags import sys_tags
    from packaging.utils import canonicalize_name, parse_wheel_filename

    supported, names = set(sys_tags()), []
    problems = []
    for wheel in wheels:
        name, _, _, tags = parse_wheel_filename(wheel)
        names.append(name)
        if not tags & supported:
            problems.append(f"{wheel} is not for this Python and processor")
    installed: dict[str, Distribution] = {}
    for each in distributions(path=path):
        installed.setdefault(canonicalize_name(each.metadata["Name"]), each)
    requirements = set(names)
    for name in names:  # grows
        for required in map(Requirement, installed[name].requires or ()):
            if required.marker and not required.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(required.name)
            if other not in installed:
                problems.append(f"{name} requires {required.name}, which is not installed")
            elif not required.specifier.contains(installed[other].version, prereleases=True):
                problems.append(f"{name} requires {required}, and {installed[other].version} is installed")
            if other in installed and other not in requirements:
                requirements.add(other)
                names.append(other)
    return problems
