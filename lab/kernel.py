"""The user-mode kernel's modules, and the one that Debian builds without what a firewall needs.

Debian's user-mode-linux has nf_tables for bridges only (NF_TABLES_INET, _IPV4, _IPV6 are not set), so no
rule of an estate could be loaded in a lab host. That one module is built again from Debian's own source of
this very kernel, once a kernel, and kept in the user's cache folder; everything else is Debian's as it is.
"""

import gzip
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.errors import LabError, MissingProgram

MODULES = Path("/usr/lib/uml/modules")
CONFIGURATION = Path("/usr/share/doc/user-mode-linux")
MODULE = "net/netfilter/nf_tables.ko"
OPTIONS = ("NF_TABLES_INET", "NF_TABLES_IPV4", "NF_TABLES_IPV6")
# Sources that no step of the build reads; leaving them packed saves a gigabyte.
UNREAD = ("*/drivers/*.[ch]", "*/sound/*.c", "*/fs/*.c", "*.rst", "*.dts*", "*/tools/testing/*")
COMPILER = "gcc-14"  # Debian 13's own, which built the kernel
XSTATE = Path(__file__).with_name("ptrace_xstate.c")


def kernel_modules() -> Path:
    """The folder with the modules of the installed user-mode kernel."""
    versions = sorted(MODULES.glob("*/modules.order")) if MODULES.is_dir() else []
    if not versions:
        raise MissingProgram(f"no kernel modules in {MODULES}: apt-get install user-mode-linux")
    return versions[-1].parent


def firewall_module(cache: Path, report: Callable[[str], None]) -> Path:
    """nf_tables.ko for the installed user-mode kernel with its inet, ip and ip6 families; built once."""
    built = cache / f"nf_tables-{kernel_modules().name}.ko"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="lab-kernel-") as scratch:
            report("building the kernel's firewall module")
            tree = _unpack(Path(scratch))
            _configure(tree)
            make = ["make", "-j2", "ARCH=um", f"CC={COMPILER}"]
            _run([*make, "olddefconfig", "modules_prepare"], tree)
            # Without the kernel's own symbol list, unknown symbols are a warning here and an error at load.
            _run([*make, "KBUILD_MODPOST_WARN=1", MODULE], tree)
            staged = built.with_suffix(".new")
            _run(["strip", "--strip-debug", "-o", str(staged), MODULE], tree)
            staged.replace(built)
    return built


def environment(cache: Path, processor: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What the user-mode kernel needs in its environment on this processor: a library on those with AMX.

    The library is built once into the folder `cache`; its source says why it is needed.
    """
    if not re.search(r"^flags\s*:.*\bamx_tile\b", processor.read_text(encoding="ascii"), re.MULTILINE):
        return {}
    digest = hashlib.sha256(XSTATE.read_bytes()).hexdigest()[:12]
    library = cache / f"{XSTATE.stem}-{digest}.so"
    if not library.exists():
        staged = library.with_suffix(".new")
        _run([COMPILER, "-shared", "-fPIC", "-O2", "-o", str(staged), str(XSTATE)], cache)
        staged.replace(library)
    return {"LD_PRELOAD": str(library)}


def _unpack(scratch: Path) -> Path:
    """Debian's source of exactly the kernel that is installed, fetched and verified by apt."""
    kernel = kernel_modules().name
    package = f"linux-source-{'.'.join(kernel.split('.')[:2])}"
    listed = subprocess.run(["apt-cache", "madison", package], check=True, capture_output=True, text=True)
    versions = [line.split("|")[1].strip() for line in listed.stdout.splitlines() if line.count("|") == 2]
    same = [version for version in versions if version.startswith(f"{kernel}-")]
    if not same:
        raise LabError(
            f"apt offers {package} {', '.join(versions) or 'in no version'}, "
            f"the user-mode kernel is {kernel}: "
            "run apt-get update, or install the user-mode-linux that belongs to one of them"
        )
    _run(["apt-get", "-qq", "download", f"{package}={same[0]}"], scratch)
    [archive] = scratch.glob(f"{package}_*.deb")
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
    """The configuration that Debian built this kernel with, and the families."""
    found = sorted([*CONFIGURATION.glob("config*"), *CONFIGURATION.glob("config.gz")])
    if not found:
        raise LabError(f"{CONFIGURATION} holds no kernel configuration: reinstall user-mode-linux")
    raw = found[-1].read_bytes()
    text = (gzip.decompress(raw) if found[-1].suffix == ".gz" else raw).decode()
    kept = [line for line in text.splitlines() if not re.search(rf"CONFIG_({'|'.join(OPTIONS)})\b", line)]
    kept += [f"CONFIG_{option}=y" for option in OPTIONS]
    (tree / ".config").write_text("\n".join(kept) + "\n", encoding="utf-8")


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise MissingProgram(f"there is no {command[0]}: apt-get install {command[0]}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n  ".join((done.stdout + done.stderr).splitlines()[-12:])
        raise LabError(f"`{' '.join(command)}` ended with {done.returncode}:\n  {last}")
