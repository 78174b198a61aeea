"""The user-mode kernel of the lab's hosts, built once from Debian's own source and kept in the user's cache folder.

Debian's binary package has nf_tables for bridges only, so an estate's firewall rules cannot be loaded, and it traces its
processes with ptrace. Linux 6.16 and later can use seccomp instead, at half the cost of a system call, a fork and a page
fault. The kernel is therefore built from the source in Debian's backports, with the configuration in `kernel.config`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.archives import Sources
from lab.errors import LabError, MissingProgram

# The series that the lab was tried with. Where Debian has it no longer, the nearest newer one is taken.
TRIED = (7, 2)
CONFIGURATION = Path(__file__).with_name("kernel.config")
PATCH = Path(__file__).with_name("kernel.patch")
# Sources that no step of the build reads; leaving them packed saves half a gigabyte.
UNREAD = ("*/sound/*.c", "*/drivers/gpu/*.[ch]", "*/drivers/net/ethernet/*.[ch]", "*/tools/testing/*")
COMPILER = "gcc-14"  # Debian 13's own
# Three quarters of the compiler's time go into headers; a tenth of it records where macros came from, for messages.
FLAGS = "-ftrack-macro-expansion=0"
FILES = 1280  # that are compiled, as measured for Linux 7.2
PROGRESS_SECONDS = 10.0
OPENSSL_HEADERS = Path("/usr/include/openssl/opensslv.h")
# The kernel's own script picks what modules are built with, and forgets that a user-mode kernel has headers of two architectures.
FORGOTTEN = (".config", "arch/x86/Makefile.um", "arch/x86/include", "arch/x86/um")
# Where Debian's headers tell their architecture and compiler; the kernel's Makefile and dkms read it.
VARIABLES = f"override ARCH = um\noverride CC = {COMPILER}\n"


def recipe() -> str:
    """Hash of the kernel's configuration and patch, without its version; a changed recipe builds a new kernel."""
    texts = (CONFIGURATION.read_text(encoding="ascii"), PATCH.read_text(encoding="ascii"))
    stated = (TRIED, COMPILER, FLAGS, *texts)
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:12]


def folder(cache: Path) -> Path:
    """Folder of the built kernel: the program `linux.uml`, the list of built-in modules in `modules`, `headers.tar.gz` to build
    more of them, `insert-sys-cert`, and `signing_key.pem` (private key and certificate), which the kernel trusts.
    """
    return cache / f"lab-kernel-{recipe()}"


def made(cache: Path, report: Callable[[str], None]) -> Path:
    """That folder; unpacks the kernel that the lock names, or builds one, unless it is cached."""
    built = folder(cache)
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="lab-kernel-new-") as scratch:
            staged = _unpacked(Path(scratch)) or _build(Path(scratch), report)
            staged.replace(built)
    return built


def enrol(built: Path, certificate: Path, program: Path) -> None:
    """Write PROGRAM, the built kernel that trusts one more certificate (DER) of those who sign modules. LabError if it has no
    place for it.
    """
    staged = program.with_suffix(".new")
    shutil.copy(built / "linux.uml", staged)
    _run([str(built / "insert-sys-cert"), "-b", str(staged), "-c", str(certificate)], program.parent)
    staged.replace(program)


def _unpacked(scratch: Path) -> Path | None:
    """The folder as built elsewhere, if the lock's archive of it is at hand and has this recipe."""
    archive = _locked_archive()
    if archive is None:
        return None
    _run(["tar", "--extract", "--no-same-owner", f"--file={archive}"], scratch)
    unpacked = folder(scratch)
    return unpacked if unpacked.exists() else None


def _locked_archive() -> Path | None:
    """`llmkeep program` compares it with the lock; the lab imports nothing of llmkeep's."""
    command = [str(Path(sys.executable).with_name("llmkeep")), "program", "lab-kernel"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def _build(scratch: Path, report: Callable[[str], None]) -> Path:
    if not OPENSSL_HEADERS.exists():
        raise MissingProgram(
            f"there is no {OPENSSL_HEADERS}, which signs modules: apt-get install libssl-dev"
        )
    report("asking Debian for the kernel's source")
    package, archive = _source(Sources(scratch))
    report(f"building the kernel: unpacking {package}")
    tree = _unpack(scratch, package, archive)
    _run(["patch", "--quiet", "--strip=1", f"--input={PATCH}"], tree)
    make = ["nice", "make", "ARCH=um", f"CC={COMPILER}", f"KCFLAGS={FLAGS}"]  # tests may run beside it
    _run([*make, f"KCONFIG_ALLCONFIG={CONFIGURATION}", "allnoconfig"], tree)
    _require_all(CONFIGURATION, tree / ".config")
    _compile([*make, "-j", str(len(os.sched_getaffinity(0))), "vmlinux", "modules"], tree, report)
    staged = scratch / "made"
    release = (tree / "include/config/kernel.release").read_text(encoding="ascii").strip()
    modules = staged / "modules" / release
    modules.mkdir(parents=True)
    shutil.copyfile(tree / "modules.builtin", modules / "modules.builtin")
    shutil.copyfile(tree / "modules.builtin.modinfo", modules / "modules.builtin.modinfo")
    (modules / "modules.order").touch()
    _run(["depmod", "--basedir", str(staged), "--moduledir", "modules", release], scratch)
    _run(["strip", "--strip-debug", "-o", str(staged / "linux.uml"), "vmlinux"], tree)
    for name in ("certs/signing_key.pem", "scripts/insert-sys-cert"):
        shutil.copy(tree / name, staged)
    _pack_headers(make, tree, staged / "headers.tar.gz")
    return staged


def _pack_headers(make: list[str], tree: Path, packed: Path) -> None:
    headers = tree.with_name("headers")
    pick = f"KBUILD_RUN_COMMAND=+scripts/package/install-extmod-build {headers}"
    _run([*make, "run-command", pick], tree)
    _run(["cp", "--recursive", "--parents", *FORGOTTEN, str(headers)], tree)
    (headers / ".kernelvariables").write_text(VARIABLES, encoding="ascii")
    _run(["tar", "--create", "--gzip", f"--file={packed}", "."], headers)


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


def _require_all(stated: Path, configuration: Path) -> None:
    """LabError if the kernel's configuration lacks a stated symbol: Kconfig drops unknown symbols silently."""
    taken = set(configuration.read_text(encoding="utf-8").splitlines())
    lines = stated.read_text(encoding="ascii").splitlines()
    dropped = [line for line in lines if line.startswith("CONFIG_") and line not in taken]
    if dropped:
        raise LabError(
            f"this kernel cannot have {', '.join(dropped)}: a symbol has a new name, or needs another one;"
            f" correct {stated}"
        )


def _compile(make: list[str], tree: Path, report: Callable[[str], None]) -> None:
    """Run make, and report how many files are compiled at least every PROGRESS_SECONDS."""
    log = tree.with_name("make.log")
    with log.open("wb") as output:
        running = subprocess.Popen(make, cwd=tree, stdout=output, stderr=subprocess.STDOUT)
        try:
            while (code := _ended(running)) is None:
                files = log.read_text(encoding="utf-8", errors="replace").count("  CC  ")
                report(f"building the kernel: {files} of about {FILES} files")
        except BaseException:
            running.terminate()
            raise
    if code:
        raise _failure(make, code, log.read_text(encoding="utf-8", errors="replace"))


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(PROGRESS_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise MissingProgram(f"there is no {command[0]}: apt-get install {command[0]}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _failure(command, done.returncode, done.stdout + done.stderr)


def _failure(command: list[str], code: int, output: str) -> LabError:
    last = "\n  ".join(output.splitlines()[-12:])
    return LabError(f"`{' '.join(command)}` ended with {code}:\n  {last}")
