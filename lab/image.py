"""The bare Debian 13 that hosts start from: made once, kept in the user's cache folder.

The root of a container is an overlay over its folder; the disk of a kernel begins as a copy of an image made of that folder.
It contains neither Python nor openssl, like a newly installed host.
"""

import fcntl
import hashlib
import inspect
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import archives, kernel
from lab.errors import LabError
from lab.files import copy

PACKAGES = ("systemd-sysv", "udev", "dbus", "openssh-server", "iproute2", "kmod")
ROOT_SIZE = "24G"  # of the file system; the file is sparse and holds what is written
# Nobody sits at a console, and apt's timers would ask the resolver for archives that are not there.
MASKED = ("getty.target", "systemd-firstboot.service", "apt-daily.timer", "apt-daily-upgrade.timer")
# What they look for is on no lab host; each reload of systemd would start them: 75 of its 200 ms of a processor.
GENERATORS = (
    "debug",
    "getty",
    "gpt-auto",
    "hibernate-resume",
    "rc-local",
    "run",
    "ssh",
    "system-update",
    "tpm2",
)
COMPILED = Path(__file__).with_name("compiled.py")
FILES = {
    "etc/locale.conf": "LANG=C.UTF-8\n",
    "etc/ssh/sshd_config.d/lab.conf": "PasswordAuthentication no\nPermitRootLogin prohibit-password\n",
    # What spares it time.
    "usr/lib/lab/compiled.py": COMPILED.read_text(encoding="utf-8"),
    "usr/local/lib/python3.13/dist-packages/lab.pth": "import sys; exec(open('/usr/lib/lab/compiled.py').read(), {})\n",
}

FSTAB = "/dev/ubda / ext4 defaults 0 1\n"  # of a host with disks

Report = Callable[[str], None]


def cache_folder() -> Path:
    """Where base images are kept: ${XDG_CACHE_HOME:-~/.cache}/llmkeep."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "llmkeep"


def tree_path() -> Path:
    """Where the bare Debian of this recipe lies once it is made, as a folder."""
    stated = (archives.SUITES, PACKAGES, MASKED, GENERATORS, sorted(FILES.items()), inspect.getsource(_build))
    return cache_folder() / f"lab-trixie-{_hash(stated)}"


def image_path() -> Path:
    """Where the disk image of this recipe lies once it is made."""
    stated = (tree_path().name, ROOT_SIZE, FSTAB, kernel.recipe(), inspect.getsource(_file_system))
    return cache_folder() / f"lab-trixie-{_hash(stated)}.img"


def _hash(stated: object) -> str:
    """Of what something is made of: a changed recipe makes a new one."""
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:12]


@contextmanager
def _making(part: str) -> Iterator[Path]:
    """The cache folder, held for one part of it: what one command makes, another one waits for."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{part}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def base_tree(report: Report) -> Path:
    """The bare Debian as a folder, made now if this recipe was never made here."""
    with _making("lab-image") as folder:
        return _tree(folder, report)


def _tree(folder: Path, report: Report) -> Path:
    tree = tree_path()
    if not tree.exists():
        for stale in folder.glob("lab-root-*"):
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(dir=folder, prefix="lab-root-") as scratch:
            report("installing a bare Debian 13")
            root = Path(scratch, "root")
            _build(root, Path(scratch))
            root.rename(tree)
    return tree


def base_image(report: Report) -> Path:
    """It as a disk image, and the kernel beside it, made now if this recipe was never made here."""
    _kernel(report)
    with _making("lab-image") as folder:
        image = image_path()
        if not image.exists():
            tree = _tree(folder, report)
            for stale in folder.glob("lab-trixie-*.img.new"):
                stale.unlink()
            report("writing its disk image")
            with tempfile.TemporaryDirectory(dir=folder, prefix="lab-root-") as scratch:
                root = Path(scratch, "root")
                copy(tree, root, "--archive", "--link")
                staged = image.with_suffix(".img.new")
                write_disk(root, staged, report)
                staged.replace(image)
    return image


def _kernel(report: Report) -> Path:
    with _making("lab-kernel") as folder:
        return kernel.made(folder, report)


def write_disk(root: Path, image: Path, report: Report) -> None:
    """Write a disk image of a host's root folder, which gets what belongs to a host with disks."""
    (root / "etc/fstab").unlink(missing_ok=True)  # where it has two names, the other one stays as it is
    (root / "etc/fstab").write_text(FSTAB, encoding="utf-8")
    shutil.copytree(_kernel(report) / "modules", root / "lib/modules", dirs_exist_ok=True)
    _file_system(root, image)


def _build(root: Path, scratch: Path) -> None:
    sources = scratch / "debian.sources"
    sources.write_text(archives.machine_sources(), encoding="utf-8")
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"]
    command += [
        f"--include={','.join(PACKAGES)}",
        *(f"--aptopt={option}" for option in archives.acquire_options()),
    ]
    credentials = Path("/etc/apt/auth.conf.d")
    if credentials.is_dir() and any(credentials.iterdir()):
        command.append(f'--setup-hook=cp {credentials}/*.conf "$1/etc/apt/auth.conf.d/"')
    command += ["trixie", str(root), str(sources)]
    log = scratch / "mmdebstrap.log"
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise LabError(f"mmdebstrap could not install Debian 13 (exit code {code}):\n  {last}")
    # Where the packages came from is this machine's business, not the hosts'.
    for pattern in ("sources.list*/*", "sources.list", "auth.conf.d/*", "apt.conf.d/99mmdebstrap"):
        for file in (root / "etc/apt").glob(pattern):
            file.unlink()
    for pattern in ("etc/ssh/ssh_host_*", "var/lib/apt/lists/*_*", "var/cache/apt/*.bin", "var/log/*.log"):
        for file in root.glob(pattern):
            file.unlink()
    (root / "etc/resolv.conf").unlink()  # this machine's own
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    systemd = root / "etc/systemd"
    masked = [systemd / "system" / unit for unit in MASKED]
    masked += [systemd / f"system-generators/systemd-{name}-generator" for name in GENERATORS]
    for path in masked:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    subprocess.run(
        ["systemctl", f"--root={root}", "--quiet", "enable", "systemd-networkd.service"], check=True
    )
    # Waiting for a network that has no uplink only costs time.
    wait_online = "systemd-networkd-wait-online.service"
    subprocess.run(["systemctl", f"--root={root}", "--quiet", "disable", wait_online], check=True)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)


def _file_system(root: Path, image: Path) -> None:
    with image.open("wb"):
        pass
    subprocess.run(["truncate", "-s", ROOT_SIZE, str(image)], check=True)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-L", "root", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    done = subprocess.run([*make, "-d", str(root), str(image)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"mkfs.ext4 could not write {image}: {done.stderr.strip()}")


def write_files(image: Path, files: dict[str, tuple[bytes, int]]) -> None:
    """Put files (path: content and mode, owned by root) into an ext4 image that is not mounted."""
    with tempfile.TemporaryDirectory() as scratch:
        commands = []
        for index, (path, (content, mode)) in enumerate(files.items()):
            source = Path(scratch, str(index))
            source.write_bytes(content)
            source.chmod(mode)
            commands += [f"rm {path}", f"write {source} {path}", f"sif {path} mode 0{0o100000 | mode:o}"]
            commands += [f"sif {path} uid 0", f"sif {path} gid 0"]
        script = Path(scratch, "commands")
        script.write_text("\n".join(commands) + "\n", encoding="utf-8")
        subprocess.run(["debugfs", "-w", "-f", str(script), str(image)], check=True, capture_output=True)
        for path, (content, _) in files.items():
            back = subprocess.run(
                ["debugfs", "-R", f"cat {path}", str(image)], check=True, capture_output=True
            )
            if back.stdout != content:
                raise LabError(f"{path} did not reach {image}: debugfs wrote {len(back.stdout)} bytes of it")
