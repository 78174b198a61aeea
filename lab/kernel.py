"""The user-mode kernel of the lab's hosts, built once from Debian's own source and kept in the user's cache folder.

Debian's ready-made one has nf_tables for bridges only, so no rule of an estate could be loaded in a host, and it follows
its processes by ptrace. Since Linux 6.16 seccomp can do that, for half the cost of a system call, a fork and a page fault.
So it is made of the source in Debian's backports, by Debian's configuration of user-mode-linux, with what hosts need built in.
"""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.archives import Sources
from lab.errors import LabError, MissingProgram

# The series that the lab was tried with. Where Debian has it no longer, the nearest newer one is taken.
TRIED = (7, 2)
CONFIGURATION = Path("/usr/share/doc/user-mode-linux")
CHANGES = Path(__file__).with_name("kernel.config")
PATCH = Path(__file__).with_name("kernel.patch")
# Sources that no step of the build reads; leaving them packed saves half a gigabyte.
UNREAD = ("*/sound/*.c", "*/drivers/gpu/*.[ch]", "*/drivers/net/ethernet/*.[ch]", "*/tools/testing/*")
COMPILER = "gcc-14"  # Debian 13's own


def recipe() -> str:
    """What the kernel is made of but for its version, as a hash: a changed recipe makes a new kernel."""
    stated = (TRIED, COMPILER, CHANGES.read_text(encoding="ascii"), PATCH.read_text(encoding="ascii"))
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:12]


def folder(cache: Path) -> Path:
    """Where the built kernel lies: the program `linux.uml`, and in `modules` the list of what is built in."""
    return cache / f"lab-kernel-{recipe()}"


def made(cache: Path, report: Callable[[str], None]) -> Path:
    """That folder, its kernel built now if this recipe was never built here."""
    built = folder(cache)
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="lab-kernel-new-") as scratch:
            _build(Path(scratch), report).replace(built)
    return built


def _build(scratch: Path, report: Callable[[str], None]) -> Path:
    report("asking Debian for the kernel's source")
    package, archive = _source(Sources(scratch))
    report(f"building a kernel of {package}")
    tree = _unpack(scratch, package, archive)
    _run(["patch", "--quiet", "--strip=1", f"--input={PATCH}"], tree)
    _configure(tree)
    make = ["nice", "make", "ARCH=um", f"CC={COMPILER}"]  # tests may run beside it
    _run([*make, "olddefconfig"], tree)
    _run([*make, "-j", str(len(os.sched_getaffinity(0))), "vmlinux"], tree)
    staged = scratch / "made"
    release = (tree / "include/config/kernel.release").read_text(encoding="ascii").strip()
    modules = staged / "modules" / release
    modules.mkdir(parents=True)
    shutil.copyfile(tree / "modules.builtin", modules / "modules.builtin")
    shutil.copyfile(tree / "modules.builtin.modinfo", modules / "modules.builtin.modinfo")
    (modules / "modules.order").touch()
    _run(["depmod", "--basedir", str(staged), "--moduledir", "modules", release], scratch)
    _run(["strip", "--strip-debug", "-o", str(staged / "linux.uml"), "vmlinux"], tree)
    return staged


def _source(sources: Sources) -> tuple[str, Path]:
    """Debian's package of the kernel's source, its name and its file."""
    offered = sources.versions(r"linux-source-\d+\.\d+")
    usable = sorted((_series(package), package) for package in offered if _series(package) >= TRIED)
    if not usable:
        tried = ".".join(map(str, TRIED))
        raise LabError(
            f"no archive of this machine's apt has a linux-source of {tried} or newer, which trixie-backports has;"
            f" seen: {', '.join(sorted(offered)) or 'none'}"
        )
    [_, package] = usable[0]
    return package, sources.download(package, offered[package])


def _series(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in package.rpartition("-")[2].split("."))


def _unpack(scratch: Path, package: str, archive: Path) -> Path:
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    packed = subprocess.Popen(unpack, stdout=subprocess.PIPE)
    member = f"./usr/src/{package}.tar.xz"
    inner = subprocess.Popen(["tar", "-xO", member], stdin=packed.stdout, stdout=subprocess.PIPE)
    exclude = [f"--exclude={pattern}" for pattern in UNREAD]
    subprocess.run(["tar", "-xJ", *exclude], stdin=inner.stdout, cwd=scratch, check=True)
    if packed.wait() or inner.wait():
        raise LabError(f"{archive.name} could not be unpacked: is there room in {scratch.parent}?")
    return scratch / package


def _configure(tree: Path) -> None:
    """Debian's configuration of user-mode-linux without its modules, and what the lab changes."""
    found = sorted([*CONFIGURATION.glob("config*"), *CONFIGURATION.glob("config.gz")])
    if not found:
        raise LabError(f"{CONFIGURATION} holds no kernel configuration: reinstall user-mode-linux")
    raw = found[-1].read_bytes()
    text = (gzip.decompress(raw) if found[-1].suffix == ".gz" else raw).decode()
    changes = CHANGES.read_text(encoding="ascii")
    changed = set(re.findall(r"^(?:# )?(CONFIG_\w+)", changes, re.MULTILINE))
    kept = [
        line
        for line in text.splitlines()
        if not line.endswith("=m") and not changed.intersection(re.findall(r"CONFIG_\w+", line))
    ]
    (tree / ".config").write_text("\n".join(kept) + "\n" + changes, encoding="utf-8")


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise MissingProgram(f"there is no {command[0]}: apt-get install {command[0]}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n  ".join((done.stdout + done.stderr).splitlines()[-12:])
        raise LabError(f"`{' '.join(command)}` ended with {done.returncode}:\n  {last}")
