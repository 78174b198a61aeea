"""What is installed on a host, each thing with what a bundle has of it, too: name, version, SHA-256. It changes nothing.

Debian's packages are dpkg's. Beside them, FOLDERS are searched for Python distributions, programs, models and vendored scripts,
wherever an operator may have put them, and the folders of kernels for modules that dpkg did not bring.
"""

from __future__ import annotations

import contextlib
import csv
import email.parser
import hashlib
import io
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config.debs import Call
from ansible_collections.llmkeep.estate.plugins.module_utils.config.files import sha256_of
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

FORMAT = "${db:Status-Abbrev}\\t${Package}\\t${Version}\\t${Architecture}\\t${source:Package}\\t${source:Version}\\n"
SHOW = ("dpkg-query", "--show", "--showformat=" + FORMAT)
WHEELS = "usr/share/python-wheels"  # of packages; `venv` unpacks pip's
FOLDERS = ("home", "opt", "root", "srv", "usr/local")
PROGRAM = re.compile(
    r"/opt/llmkeep/programs/([^/]+)/[^/]+(?=/|$)"
)  # a folder of module bundle_program, with the program's name
SITE = re.compile(r".*?/(?:site|dist)-packages(?=/|$)")
METADATA = (".dist-info", ".egg-info")
SCRIPTS = "/llmweb/static/vendor"  # of the pages, below the folder of modules
SUMS = "SHA256SUMS"
WEIGHTS = (".ckpt", ".gguf", ".pt", ".pth", ".safetensors")
# Of another host's file system there is too much, and it is that host's.
NETWORK = re.compile(r"nfs\d?|cifs|smb3|ceph|glusterfs|lustre|beegfs|gpfs|fuse\..*")
MOST = 2_000_000  # entries of folders
MOST_TEXT = 64 << 20  # bytes of metadata
# Folders of modules that are not the kernel's own.
MODULES = ("extra", "misc", "updates")
TAINTS = frozenset(
    "OPFE"
)  # of the kernel by a module that others built, that is proprietary, forced or not signed


@dataclass
class Installed:
    """What was read, as rows. `skipped`: file systems that were not searched.

    packages: name, version, architecture, source, its version. python: name, version, folder, SHA-256 of its record (see
    `record_digest`), the package whose wheel it was unpacked from. programs, scripts: path, SHA-256. models: folder, SHA-256 of
    its sums, empty where it has none. modules: path, SHA-256, the package that it was built from. loaded: modules of others that
    the kernel runs and no file brought; None where that is another host's kernel.
    """

    packages: list[list[str]] = field(default_factory=list)
    python: list[list[str]] = field(default_factory=list)
    programs: list[list[str]] = field(default_factory=list)
    scripts: list[list[str]] = field(default_factory=list)
    models: list[list[str]] = field(default_factory=list)
    modules: list[list[str]] = field(default_factory=list)
    loaded: list[str] | None = None
    skipped: list[str] = field(default_factory=list)


def read(root: Path, call: Call) -> Installed:
    """All of it. Raises Refused where a folder has too many entries, OSError, and what CALL raises."""
    owners = owned(root / "var/lib/dpkg/info")
    inventory = Installed(packages=packages(call), skipped=networks(root))
    search(root, owners, inventory)
    unpacked = wheels(root, owners)
    inventory.python = [[*row, unpacked.get(row[3], "")] for row in inventory.python]
    inventory.modules = modules(root, owners)
    if not (root / "run/systemd/container").exists():
        inventory.loaded = loaded(root, owners, (row[0] for row in inventory.modules))
    return inventory


def packages(call: Call) -> list[list[str]]:
    """Rows of Debian's packages."""
    lines = [line.split("\t") for line in call([*SHOW]).splitlines()]
    return [fields for status, *fields in lines if status[1:2] == "i"]


def owned(info: Path) -> dict[str, str]:
    """The package by the path of its file, of those below FOLDERS, of wheels, and of kernel modules and their sources."""
    prefixes = tuple(
        f"/{folder}/" for folder in (*FOLDERS, WHEELS, "usr/lib/modules", "lib/modules", "usr/src")
    )
    owners = {}
    for path in sorted(info.glob("*.list")):
        package = path.name.removesuffix(".list").partition(":")[0]
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith(prefixes):
                owners[
                    line.replace("/lib/modules", "/usr/lib/modules", 1) if line.startswith("/lib/") else line
                ] = package
    return owners


def networks(root: Path) -> list[str]:
    """Mounts of other hosts' file systems below FOLDERS: mount point and type."""
    mounts = root / "proc/self/mounts"
    rows = [line.split(" ") for line in mounts.read_text().splitlines()] if mounts.exists() else []
    below = tuple(f"/{folder}" for folder in FOLDERS)
    return [f"{row[1]} {row[2]}" for row in rows if row[1].startswith(below) and NETWORK.fullmatch(row[2])]


def search(root: Path, owners: dict[str, str], inventory: Installed) -> None:
    """Walk FOLDERS, and add what they have.

    Services and users may change them meanwhile, so each file is opened from its folder's descriptor, and no link is followed.
    """
    away = {mount.rpartition(" ")[0] for mount in inventory.skipped}
    models: list[str] = []
    archived: set[str] = set()
    entries = 0
    for folder in filter(lambda name: (root / name).is_dir(), FOLDERS):
        for place, directories, names, descriptor in os.fwalk(root / folder, onerror=_raise):
            here = f"/{Path(place).relative_to(root)}"
            entries += len(directories) + len(names)
            if entries > MOST:
                raise Refused(
                    f"{here}: there are more than {MOST} files below {', '.join(FOLDERS)}: move data of other programs elsewhere"
                )
            if {"MANIFEST.json", "MANIFEST.json.sig"} <= set(names):
                directories.clear()  # a bundle or a release: carried, not installed
                continue
            directories[:] = sorted(name for name in directories if f"{here}/{name}" not in away)
            site = SITE.match(here)
            if site and here == site[0]:
                directories[:] = [name for name in directories if name.endswith(METADATA) or name == "llmweb"]
            if site:
                inventory.python += distributions(descriptor, here, site[0], names)
                if here == site[0] + SCRIPTS:
                    inventory.scripts += hashed(
                        descriptor, here, [name for name in names if name.endswith(".js")]
                    )
                continue
            if SUMS in names or any(name.endswith(WEIGHTS) for name in names):
                inventory.models += model(descriptor, here, names, models)
            own = PROGRAM.match(here)
            if own and here == own[0]:
                archived = members(descriptor, own[1])
            programs = [
                name
                for name in names
                if f"{here}/{name}" not in owners and is_program(descriptor, here, name)
            ]
            # What a program that is an archive was unpacked to is that program.
            inventory.programs += [
                row for row in hashed(descriptor, here, programs) if not (own and row[1] in archived)
            ]


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that is gone meanwhile
        raise error


@contextlib.contextmanager
def opened(descriptor: int, name: str) -> Iterator[BufferedReader | None]:
    """A plain file of the folder with this DESCRIPTOR; None for anything else, and for what is gone."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except OSError:
        yield None
        return
    with os.fdopen(handle, "rb") as file:
        yield file if stat.S_ISREG(os.fstat(handle).st_mode) else None


def text(descriptor: int, name: str) -> str:
    """The content of a plain file, up to a bound; empty where there is none."""
    with opened(descriptor, name) as file:
        return file.read(MOST_TEXT).decode(errors="replace") if file else ""


def hashed(descriptor: int, here: str, names: list[str]) -> Iterator[list[str]]:
    """Path and SHA-256 of plain files of a folder."""
    for name in sorted(names):
        with opened(descriptor, name) as file:
            if file:
                yield [f"{here}/{name}", hashlib.file_digest(file, "sha256").hexdigest()]


def is_program(descriptor: int, here: str, name: str) -> bool:
    """Whether a file is one of the estate's programs or a part of one, or an executable in machine code."""
    own = PROGRAM.match(here)
    with opened(descriptor, name) as file:
        if not file:
            return False
        if own and (name.endswith(".jar") or (here, name) == (own[0], own[1])):
            return True
        executable = os.fstat(file.fileno()).st_mode & 0o111 and not re.search(r"\.so(\.|$)", name)
        return bool(executable) and file.read(4) == b"\x7fELF"


def members(descriptor: int, name: str) -> set[str]:
    """SHA-256 of the files in a tar archive; none for a file that is not an archive."""
    digests: set[str] = set()
    with opened(descriptor, name) as file, contextlib.suppress(tarfile.TarError, EOFError):
        if file:
            archive = tarfile.TarFile(fileobj=file)
            contents = (archive.extractfile(member) for member in archive if member.isreg())
            digests.update(hashlib.sha256(each.read()).hexdigest() for each in contents if each)
    return digests


def model(descriptor: int, here: str, names: list[str], models: list[str]) -> Iterator[list[str]]:
    """A row if a folder has a model's weights, or sums of such, and is not below one of MODELS, which it joins."""
    sums = text(descriptor, SUMS)
    if sums and any(line.endswith(WEIGHTS) for line in sums.splitlines()):
        models.append(f"{here}/")
        yield [here, hashlib.sha256(sums.encode()).hexdigest()]
    elif any(name.endswith(WEIGHTS) for name in names) and not here.startswith(tuple(models)):
        yield [here, ""]


def distributions(descriptor: int, here: str, site: str, names: list[str]) -> Iterator[list[str]]:
    """Rows of the Python distributions whose metadata are files of the folder HERE, of the folder of modules SITE."""
    described = [name for name in names if here == site and name.endswith(".egg-info")]
    if here.endswith(METADATA):
        described = [name for name in names if name in ("METADATA", "PKG-INFO")]
    for name in sorted(described):
        fields = email.parser.HeaderParser().parsestr(text(descriptor, name))
        record = text(descriptor, "RECORD")
        yield [str(fields["Name"]), str(fields["Version"]), site, record_digest(record) if record else ""]


def wheels(root: Path, owners: dict[str, str]) -> dict[str, str]:
    """The package of each wheel that packages brought, by the SHA-256 of its record."""
    packages = {}
    for path in sorted((root / WHEELS).glob("*.whl")):
        if package := owners.get(f"/{path.relative_to(root)}"):
            with zipfile.ZipFile(path) as archive:
                packages[wheel_digest(archive)] = package
    return packages


def wheel_digest(wheel: zipfile.ZipFile) -> str:
    """`record_digest` of a wheel; ValueError for a file that is none. Below, a wheel may have the records of others."""
    (name,) = (each for each in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", each))
    return record_digest(wheel.read(name).decode(errors="replace"))


def record_digest(record: str) -> str:
    """SHA-256 over what a wheel's RECORD and that of its installation have in common: paths and hashes of its modules.

    Not in both: the record and what the installer adds, byte code, and all that lies outside of the folder of modules.
    """
    lines = set()
    for row in csv.reader(io.StringIO(record)):
        if len(row) < 2 or not row[1] or row[0].startswith(("../", "/")) or row[0].endswith(".pyc"):
            continue
        path = re.sub(r"^[^/]+\.data/(?:purelib|platlib)/", "", row[0])
        outside = re.match(r"[^/]+\.data/", path)
        added = re.fullmatch(r"[^/]+\.dist-info/(?:RECORD|INSTALLER|REQUESTED|direct_url\.json)", path)
        if not outside and not added:
            lines.add(f"{row[1]}  {path}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def modules(root: Path, owners: dict[str, str]) -> list[list[str]]:
    """Rows of the kernel modules that no package has as a file."""
    rows = []
    for kernel in sorted((root / "usr/lib/modules").glob("*")):
        for path in sorted(
            path for folder in MODULES for path in (kernel / folder).rglob("*.ko*") if path.is_file()
        ):
            name = f"/{path.relative_to(root)}"
            if name not in owners:
                rows.append([name, sha256_of(path), built_from(root, owners, kernel.name, path.name)])
    return rows


def built_from(root: Path, owners: dict[str, str], kernel: str, module: str) -> str:
    """The package whose sources DKMS built a module from; empty where it did not, or where no package has them."""
    for built in (root / "var/lib/dkms").glob(f"*/*/{kernel}/*/module/{module}"):
        name, version = built.relative_to(root / "var/lib/dkms").parts[:2]
        if package := owners.get(f"/usr/src/{name}-{version}/dkms.conf"):
            return package
    return ""


def loaded(root: Path, owners: dict[str, str], files: Iterable[str]) -> list[str]:
    """Modules of others that the kernel runs, by name, and that neither a package nor one of these FILES brought."""
    brought = {_module(name) for name in [*owners, *files] if ".ko" in name}
    taints = {path.parent.name: path.read_text() for path in (root / "sys/module").glob("*/taint")}
    return sorted(name for name, taint in taints.items() if set(taint) & TAINTS and name not in brought)


def _module(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")
