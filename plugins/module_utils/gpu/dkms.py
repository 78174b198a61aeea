"""A driver's kernel modules, built by dkms for a kernel that does not run yet.

The proof is a build in a scratch folder, with the kernel's headers and the driver's sources taken from their packages and
not installed: a failure leaves /lib/modules, /usr/src and /var/lib/dkms as they were. What was built, signed and verified
there is kept, and installed later without being built again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config import rollout
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu import module_signature
from ansible_collections.llmkeep.estate.plugins.module_utils.gpu.signing import Signing, shown_pin

COMPILER = re.compile(r"^(?P<file>[^\s:]+):(?P<line>\d+)(:\d+)?: (fatal )?error: (?P<what>.+)$", re.MULTILINE)
LINKER = re.compile(r"^ERROR: modpost: (?P<what>.+)$", re.MULTILINE)
SECONDS = 3600  # NVIDIA's driver takes up to 20 minutes on two busy cores
UNTOUCHED = "Nothing was installed, and the running kernel and its modules are as they were"


class Failed(rollout.Failed):  # type: ignore[misc]
    """The driver cannot be built, signed or installed; the message says why and what to do."""


@dataclass(frozen=True)
class Driver:
    """A driver and the kernel it is built for. `package` brings the sources; without one they lie in /usr/src already."""

    name: str
    version: str
    kernel: str
    package: str = ""


@dataclass(frozen=True)
class Places:
    """Where dkms and its results live."""

    modules: Path = Path("/lib/modules")
    sources: Path = Path("/usr/src")
    tree: Path = Path("/var/lib/dkms")
    builds: Path = Path("/var/lib/llmkeep/gpu")  # scratch folders too: NVIDIA's driver needs 1 GB

    def options(self) -> list[str]:
        """dkms' options for them."""
        trees = {"--installtree": self.modules, "--sourcetree": self.sources, "--dkmstree": self.tree}
        return [str(word) for pair in trees.items() for word in pair]

    def proven(self, driver: Driver) -> Path:
        """Where modules that were proven wait for their installation."""
        return self.builds / f"{driver.name}-{driver.version}-{driver.kernel}"

    def of(self, driver: Driver) -> Path:
        """Where dkms has a driver's modules for a kernel, by architecture."""
        return self.tree / driver.name / driver.version / driver.kernel


def run(argv: list[str], environment: Mapping[str, str] | None = None, passed: tuple[int, ...] = ()) -> str:
    """Output of a program, both streams; Failed with it if it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        pass_fds=passed,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(argv[:2])} ended with {done.returncode}: {done.stdout.strip()[-600:]}")
    return done.stdout


def first_error(log: str) -> str:
    """The first error of a build log, as FILE:LINE: MESSAGE where the compiler named them; empty if there is none."""
    if match := COMPILER.search(log):
        return f"{Path(match['file']).name}:{match['line']}: {match['what']}"
    if match := LINKER.search(log):
        return match["what"]
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(("make", "#", "-"))]
    return lines[-1].strip() if lines else ""


def unpacked(packages: list[str], folder: Path) -> None:
    """Unpack Debian packages into a folder without installing them."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        debs = Path(place)
        command = f'cd "{debs}" && exec apt-get -qq -o APT::Sandbox::User=root download "$@"'
        run(["sh", "-c", command, "download", *packages])
        for deb in sorted(debs.glob("*.deb")):
            run(["dpkg-deb", "--extract", str(deb), str(folder)])


def depends(name: str, kind: str) -> list[str]:
    """Packages of a kind (a regular expression) that a package depends on. Failed if the mirror has none of that name."""
    try:
        output = run(["apt-cache", "depends", "--no-recommends", "--no-suggests", name])
    except Failed:
        raise Failed(
            f"the mirror has no package {name}, so no driver can be built for that kernel. {UNTOUCHED}. Build the bundle "
            "with the headers of its kernel (artifacts.yml, apt)"
        ) from None
    return re.findall(rf"^ +Depends: ({kind})$", output, re.MULTILINE)


def next_kernel(flavour: str) -> str:
    """Release of the kernel that a flavour's headers are for, in the mirror's package lists."""
    name = f"linux-headers-{flavour}"
    headers = depends(name, r"linux-headers-\d\S+")
    if not headers:
        raise Failed(f"the package {name} depends on the headers of no kernel: correct gpu_kernel_flavour")
    return headers[0].removeprefix("linux-headers-")


def prepare(driver: Driver, places: Places, folder: Path) -> Places:
    """Headers and sources for a build in a scratch folder."""
    install, sources = folder / "modules", places.sources
    (install / driver.kernel).mkdir(parents=True)
    build, common = (places.modules / driver.kernel / name for name in ("build", "source"))
    if not (build / "Makefile").exists():
        package = f"linux-headers-{driver.kernel}"
        unpacked([package, *depends(package, r"linux-(?:headers|kbuild)-\S+")], folder)
        build = folder / f"usr/src/linux-headers-{driver.kernel}"
        # Debian's Makefile of a flavour includes the common one by its installed path.
        makefile = build / "Makefile"
        makefile.write_text(makefile.read_text().replace("/usr/src/", f"{folder}/usr/src/"))
        common = folder / f"usr/lib/modules/{driver.kernel}/source"
    (install / driver.kernel / "build").symlink_to(build)
    (install / driver.kernel / "source").symlink_to(common)
    if driver.package:
        unpacked([driver.package], folder)
        sources = folder / "usr/src"
    if not (sources / f"{driver.name}-{driver.version}" / "dkms.conf").exists():
        raise Failed(
            f"{driver.package or sources} has no sources of {driver.name} {driver.version} for dkms. {UNTOUCHED}."
            " Correct the driver set (gpu_sets), or build the bundle with its packages"
        )
    (folder / "tree").mkdir()
    return Places(install, sources, folder / "tree", places.builds)


def headers(driver: Driver, places: Places) -> dict[str, str]:
    """Where NVIDIA's Makefile finds the kernel's headers; it would look in /lib/modules, whatever dkms is told."""
    place = places.modules / driver.kernel
    return {"SYSSRC": f"{place}/source", "SYSOUT": f"{place}/build"}


def words(driver: Driver) -> list[str]:
    return ["-m", driver.name, "-v", driver.version, "-k", driver.kernel]


def built(folder: Path) -> list[Path]:
    """The modules in a folder that dkms has for one kernel."""
    return sorted(folder.glob("*/module/*.ko*"))


def prove(driver: Driver, signing: Signing | None, places: Places) -> None:
    """Build, sign and verify in a scratch folder, and keep the result. Failed leaves the host as it was."""
    places.builds.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="scratch.", dir=places.builds) as place:
        aside = prepare(driver, places, Path(place))
        with shown_pin(signing) as (environment, passed):
            try:
                # Without --verbose dkms shows its progress by a sleep that keeps its output open for 3 s.
                build = ["dkms", "build", "--verbose", *aside.options(), *words(driver)]
                run(build, environment | headers(driver, aside), passed)
            except Failed as problem:
                raise Failed(_why(driver, aside, str(problem))) from None
        require_signed(built(aside.of(driver)), signing)
        aside.of(driver).rename(places.proven(driver))


def _why(driver: Driver, places: Places, output: str) -> str:
    logs = sorted(places.tree.glob("**/make.log"))
    log = logs[0].read_text(errors="replace") if logs else ""
    hint = ""
    if log:
        (places.builds / "make.log").write_text(log)
        hint = f" The compiler's log is {places.builds}/make.log."
    return (
        f"the driver {driver.name} {driver.version} does not build for the kernel {driver.kernel}:"
        f" {first_error(log) or output}. {UNTOUCHED}.{hint} Choose a set for this kernel (gpu_set)"
    )


def require_signed(modules: list[Path], signing: Signing | None) -> None:
    """Failed unless there are modules and, where they have to be, all are signed by the certificate."""
    faults = module_signature.faults(modules, signing.certificate) if signing else []
    if faults or not modules:
        raise Failed(
            f"{'; '.join(faults) or 'dkms built no module'}. {UNTOUCHED}. dkms goes on where signing fails: see that the HSM"
            " is reachable and that the certificate is its key's (docs/operate/gpu.md)"
        )


def is_installed(driver: Driver, signing: Signing | None, places: Places) -> bool:
    """Whether dkms has it installed for the kernel, signed by the certificate."""
    if not shutil.which("dkms"):
        return False
    output = run(["dkms", "status", *places.options(), *words(driver)])
    if not re.search(
        rf"^{re.escape(f'{driver.name}/{driver.version}, {driver.kernel}')}, \w+: installed",
        output,
        re.MULTILINE,
    ):
        return False
    return not signing or not module_signature.faults(built(places.of(driver)), signing.certificate)


def install(driver: Driver, signing: Signing | None, places: Places) -> None:
    """Install the proven modules, without building them again, beside those of other kernels."""
    proven = places.proven(driver)
    if not proven.exists():
        raise Failed(f"{proven} is missing: build the driver first (state proven)")
    try:
        require_signed(built(proven), signing)
        # Not by `dkms ldtarball`, which in 3.2 fails where the driver is there for another kernel.
        if not (places.of(driver).parent / "source").exists():
            run(["dkms", "add", *places.options(), "-m", driver.name, "-v", driver.version])
        shutil.copytree(proven, places.of(driver), dirs_exist_ok=True)
        run(["dkms", "install", "--verbose", *places.options(), "--force", *words(driver)])
        (places.builds / "kernel").write_text(f"{driver.kernel}\n")  # for the role's checks
    finally:
        shutil.rmtree(proven)  # after a failure the next run builds again
