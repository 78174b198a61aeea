"""Contents of an image: Debian packages, wheels, programs, our code. Each is built as a folder of added files."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmkeep.bundle import cache, lock
from llmkeep.bundle.aptrepo import COMPONENT, SUITE
from llmkeep.bundle.manifest import Entry, Manifest
from llmkeep.errors import LlmkeepError

ENTER = Path(__file__).with_name("enter.sh")
PACKAGES_INDEX = f"apt/dists/{SUITE}/{COMPONENT}/binary-amd64/Packages"
OPA = "bin/opa"
OWN = "serving"  # the environment that our wheels join
# Where an environment lies, by its name. vLLM's has all of its own: other versions than ours, and no package of Debian's.
VENVS = {OWN: "opt/llmkeep/venv", "vllm": "opt/vllm"}
USER = 10001
ACCOUNT = {
    "passwd": f"llmkeep:x:{USER}:{USER}:llmkeep:/nonexistent:/usr/sbin/nologin\n",
    "group": f"llmkeep:x:{USER}:\n",
    "shadow": "llmkeep:!:::::::\n",
}
COMMANDS = ("llm-audit", "llm-probe", "llm-serve")
# Of role opa, which installs them on hosts.
SCRIPTS = {"opa-query": "opa_query.py", "serve-policy": "serve_policy.py"}
# Neither translations, manuals nor the tests of torch, but all copyright files; and no wait for the disk after each file.
DPKG = (
    "force-unsafe-io",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/lib/libtorch-test/*",
)
# Folders whose content is the kernel's, the container's, or of this build alone; and files of this build alone.
EMPTIED = ("dev", "proc", "run", "sys", "tmp", "var/cache", "var/lib/apt", "var/log", "var/tmp")
REMOVED = (
    "etc/*-",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/apt/sources.list*",
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/available",
    "var/lib/dpkg/lock*",
    "var/lib/dpkg/triggers/Lock",
)
TEMPORARY = "/tmp"  # noqa: S108 -- in the root file system, a tmpfs of the one command
PIP = ("--isolated", "--disable-pip-version-check", "--no-cache-dir")
INSTALL = (
    *("install", "--quiet", "--no-index", "--find-links=/mnt", "--no-deps", "--no-compile", "--ignore-requires-python"),
    *("--require-hashes", "--only-binary=:all:", "--requirement=/mnt/requirements.txt"),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A verified bundle, the environments of it that an image runs, and its Debian packages, `name=version`.

    `epoch`: when the newest of these packages was built, in seconds since 1970. No file of the image is younger.
    """

    bundle: Path
    manifest: Manifest
    environments: list[str]
    packages: list[str]
    epoch: int

    def has(self, path: str) -> bool:
        """Whether the bundle has a file."""
        return any(entry.path == path for entry in self.manifest.files)

    def sha256(self, path: str) -> str:
        """Of a file of the bundle."""
        return next(entry.sha256 for entry in self.manifest.files if entry.path == path)

    def wheels(self, environment: str, *, ours: bool) -> list[Entry]:
        """Our own wheels of an environment, or all others."""
        listed = [entry for entry in self.manifest.files if entry.path.startswith(f"wheels/{environment}/")]
        return [entry for entry in listed if entry.path.endswith(".whl") and (not entry.purl) == ours]

    def requirements(self, environment: str, *, ours: bool) -> str:
        """The lines of requirements.txt that name them, with hashes."""
        hashes = {entry.sha256 for entry in self.wheels(environment, ours=ours)}
        lines = (self.bundle / "wheels" / environment / "requirements.txt").read_text().splitlines()
        return "".join(f"{line}\n" for line in lines if line.split("sha256:")[-1] in hashes)


def source(bundle: Path, verified: Manifest, environments: list[str], roles: list[str]) -> Source:
    """What a bundle has for an image; raises LlmkeepError where something is lacking. `roles`: of artifacts.yml."""
    what = f"{bundle}, of profile {verified.profile},"
    paths = {entry.path for entry in verified.files}
    for environment in environments:
        if f"wheels/{environment}/requirements.txt" not in paths:
            raise LlmkeepError(
                f"{what} has no wheels/{environment}: build a bundle of a profile that carries this environment"
            )
    pinned = lock.load(bundle / "tree")
    if lacking := [role for role in roles if role not in pinned.roles]:
        raise LlmkeepError(
            f"{what} has no packages of {', '.join(lacking)}: name these roles of artifacts.yml in its profile, and "
            "build it again"
        )
    packages = sorted({package for role in roles for package in pinned.roles[role]})
    built = [_built(bundle / "apt/pool" / pinned.debs[package].file) for package in packages]
    return Source(bundle, verified, environments, packages, max(built))


def _built(package: Path) -> int:
    """When a Debian package was built: the time of the first member of its archive, in seconds since 1970."""
    with package.open("rb") as file:
        return int(file.read(36)[24:])


def debian(source: Source, tree: Path) -> None:
    """A root file system of the packages and what they need, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="llmkeep-") as scratch:
        # apt as root: the bundle's folder may be closed to its own user.
        entry = f"deb [signed-by={source.bundle.resolve()}/keyring.pgp] copy:{source.bundle.resolve()}/apt {SUITE} {COMPONENT}"
        command = ["mmdebstrap", "--mode=root", "--variant=essential", "--format=directory", "--quiet"]
        command += [f"--include={','.join(source.packages)}", *(f"--dpkgopt={each}" for each in DPKG)]
        command += ['--aptopt=APT::Sandbox::User "root"', SUITE, str(tree), entry]
        _run(command, source.epoch, scratch)
    for folder in EMPTIED:
        for path in (tree / folder).iterdir():
            _remove(path)
    for pattern in REMOVED:
        for path in tree.glob(pattern):
            _remove(path)
    for path in list(tree.rglob("__pycache__")):
        shutil.rmtree(path)
    for name, line in ACCOUNT.items():
        with (tree / "etc" / name).open("a") as file:
            file.write(line)


def wheels(source: Source, environment: str, tree: Path, below: list[Path]) -> None:
    """An environment with all its wheels but ours, over Debian's packages where ours join it."""
    pip = _pip(environment, below)
    with (
        _staged(source, environment, ours=False) as staged,
        _inside(below, tree, staged, source.epoch) as inside,
    ):
        options = ["--system-site-packages"] if environment == OWN else []
        inside("/usr/bin/python3", "-m", "venv", "--without-pip", *options, f"/{VENVS[environment]}")
        inside(*pip, *INSTALL)
        if environment != OWN:  # ours is whole once our wheels are there
            inside(*pip, "check")


def programs(source: Source, tree: Path) -> None:
    """OPA."""
    place = tree / "usr/local/bin"
    place.mkdir(parents=True)
    shutil.copyfile(source.bundle / OPA, place / "opa")
    (place / "opa").chmod(0o755)


def code(source: Source, tree: Path, below: list[Path]) -> None:
    """Our wheels in the environment, which must be whole then, and links to their commands."""
    pip = _pip(OWN, below)
    with _staged(source, OWN, ours=True) as staged, _inside(below, tree, staged, source.epoch) as inside:
        inside(*pip, *INSTALL)
        inside(*pip, "check")
    commands, scripts = tree / "usr/local/bin", tree / "usr/local/lib/llmkeep"
    for folder in (commands, scripts):
        folder.mkdir(parents=True)
    for name in COMMANDS:
        (commands / name).symlink_to(f"/{VENVS[OWN]}/bin/{name}")
    for name, file in SCRIPTS.items():
        shutil.copyfile(source.bundle / "tree/roles/opa/files" / file, scripts / name)
        (scripts / name).chmod(0o755)


@contextmanager
def _staged(source: Source, environment: str, *, ours: bool) -> Iterator[Path]:
    """A folder with some of the wheels and the requirements that name them."""
    with tempfile.TemporaryDirectory(prefix="llmkeep-") as folder:
        for entry in source.wheels(environment, ours=ours):
            cache.place(source.bundle / entry.path, Path(folder, Path(entry.path).name))
        Path(folder, "requirements.txt").write_text(source.requirements(environment, ours=ours))
        yield Path(folder)


@contextmanager
def _inside(below: list[Path], tree: Path, staged: Path, epoch: int) -> Iterator[Callable[..., None]]:
    """Runs commands in the root file system of the folders BELOW, from bottom to top; TREE takes what they write."""
    # An overlay's work folder has to be on the file system of its upper one.
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="llmkeep-") as scratch:
        work, root = Path(scratch, "work"), Path(scratch, "root")
        work.mkdir()
        root.mkdir()
        lower = ":".join(str(folder) for folder in reversed(below))

        def run(*command: str) -> None:
            places = [lower, str(tree), str(work), str(root), str(staged)]
            _run(["unshare", "--mount", "--net", "sh", str(ENTER), *places, *command], epoch)

        yield run


def _pip(environment: str, below: list[Path]) -> list[str]:
    """pip of Debian's wheel, which runs where it lies: environments have none."""
    (wheel,) = (below[0] / "usr/share/python-wheels").glob("pip-*.whl")
    return [f"/{VENVS[environment]}/bin/python", f"/usr/share/python-wheels/{wheel.name}/pip", *PIP]


def _run(command: list[str], epoch: int, temporary: str = TEMPORARY) -> None:
    """Run a command with an environment that is the same on all builders."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": temporary,
        "TMPDIR": temporary,
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "SOURCE_DATE_EPOCH": str(epoch),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LlmkeepError(f"{command[0]} is not installed: apt-get install {command[0]}") from error
    if done.returncode != 0:
        last = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise LlmkeepError(f"{command[0]} failed with exit code {done.returncode}:\n  {last}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
