"""nf_tables that filters IP, for the user-mode kernel.

Debian's user-mode kernel has nf_tables but none of the families ip, ip6 and inet, so no estate's firewall would
load. The families are switches inside nf_tables.ko alone: that one module is built again from Debian's own source
of the same kernel version, with the same configuration and the switches on, once for a kernel, and is cached.
"""

import gzip
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.errors import LabError, MissingProgram

CONFIG = Path("/usr/share/doc/user-mode-linux/config.gz")
SWITCHES = ("NF_TABLES_INET", "NF_TABLES_IPV4", "NF_TABLES_IPV6")
PROGRAMS = ("gcc", "make", "flex", "bison", "bc", "xz", "strip")
# What the build does not read, two thirds of the tree.
LEFT_OUT = ("*/Documentation/*", "*/drivers/*.[chS]", "*/sound/*.[ch]", "*/tools/testing/*", "*/fs/*.[ch]")


def nf_tables(kernel: str, cache: Path, report: Callable[[str], None]) -> Path:
    """nf_tables.ko for this kernel version; built now if it is not in the cache folder."""
    module = cache / f"nf_tables-{kernel}.ko"
    if not module.exists():
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise MissingProgram(
                f"to build nf_tables, {', '.join(missing)} is missing: install requirements.apt"
            )
        report(f"building nf_tables for kernel {kernel}")
        with tempfile.TemporaryDirectory(dir=cache, prefix="lab-kernel-") as scratch:
            built = build(kernel, Path(scratch))
            staged = module.with_suffix(".ko.new")
            shutil.copyfile(built, staged)
            staged.replace(module)
    return module


def build(kernel: str, scratch: Path) -> Path:
    """The module, built in a scratch folder."""
    series = ".".join(kernel.split(".")[:2])
    package = f"linux-source-{series}"
    offered = run(scratch, "apt-cache", "madison", package).stdout
    versions = [line.split("|")[1].strip() for line in offered.splitlines()]
    fitting = [version for version in versions if version.startswith(f"{kernel}-")]
    if not fitting:
        raise LabError(
            f"no archive of this machine has {package} {kernel}-*, only {', '.join(versions) or 'none'}:"
            " apt-get update, or install the user-mode-linux that goes with one of them"
        )
    run(scratch, "apt-get", "download", "-qq", f"{package}={fitting[0]}")
    archive = next(scratch.glob("*.deb"))
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as outer:
        run(scratch, "tar", "-x", f"./usr/src/{package}.tar.xz", stdin=outer.stdout)
    leave_out = [f"--exclude={pattern}" for pattern in LEFT_OUT]
    run(scratch, "tar", "-xJf", f"usr/src/{package}.tar.xz", "--wildcards", *leave_out)
    tree = scratch / package
    (tree / "Documentation").mkdir(exist_ok=True)
    (tree / "Documentation/Kconfig").touch()
    config = gzip.decompress(CONFIG.read_bytes()).decode()
    for switch in SWITCHES:
        config = config.replace(f"# CONFIG_{switch} is not set", f"CONFIG_{switch}=y")
    (tree / ".config").write_text(config.replace("CONFIG_DEBUG_INFO=y", "# CONFIG_DEBUG_INFO is not set"))
    (tree / "Module.symvers").touch()
    make = ("make", "-s", "ARCH=um", "KBUILD_MODPOST_WARN=1")
    run(tree, *make, "olddefconfig")
    run(tree, *make, "-j2", "modules_prepare")
    run(tree, *make, "-j2", "net/netfilter/nf_tables.ko")
    module = tree / "net/netfilter/nf_tables.ko"
    run(tree, "strip", "--strip-debug", str(module))
    return module


def run(folder: Path, *argv: str, stdin: object = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder; LabError with its last words if it fails."""
    done = subprocess.run(argv, cwd=folder, stdin=stdin, capture_output=True, text=True, check=False)  # type: ignore[call-overload]
    if done.returncode:
        last = "\n  ".join((done.stderr or done.stdout).splitlines()[-8:])
        raise LabError(f"nf_tables: {' '.join(argv[:4])} ended with {done.returncode}:\n  {last}")
    return done  # type: ignore[no-any-return]
