"""A host with its own kernel: user-mode-linux, a real Linux in an ordinary process, with disks in files."""

import os
import shutil
import subprocess
from pathlib import Path

from lab import image, kernel
from lab.container import Container
from lab.errors import LabError
from lab.files import copy_sparse
from lab.machine import Machine
from lab.network import mac, tap
from lab.process import Daemon

STICK = "ubd15"  # /dev/ubdp
STICK_SERIAL = "LLMKEEP-STICK"


class UserModeKernel(Machine):
    """Has its own device-mapper, swap, clock and modules; a power cut loses writes that were not flushed."""

    kind = "kernel"
    stick_source = ("/dev/disk/by-label/LLMKEEP", "ro")

    @staticmethod
    def base(report: image.Report) -> Path:
        return image.base_image(report)

    @property
    def root(self) -> Path:
        """Its root disk."""
        return self.folder / "root.img"

    @property
    def stick(self) -> Path:
        """Its stick, an ext4 image."""
        return self.folder / "stick.img"

    @property
    def enrolled(self) -> Path:
        """The lab's kernel with a certificate that this host's owner trusts, if one was enrolled since it was built."""
        return self.folder / f"{kernel.folder(image.cache_folder()).name}.uml"

    @property
    def cable_name(self) -> str:
        return tap(self.host.address)

    def exists(self) -> bool:
        return self.root.exists()

    def has_stick(self) -> bool:
        return self.stick.exists()

    def disks(self) -> list[Path]:
        """Its disks, the root disk first, without the medium."""
        return [self.root, *(self.folder / f"{disk.serial}.img" for disk in self.host.disks)]

    def disk_bytes(self) -> int:
        return sum(file.stat().st_blocks * 512 for file in self.disks() if file.exists())

    def create(self, base: Path, files: dict[str, tuple[bytes, int]]) -> None:
        for disk, file in zip(self.host.disks, self.disks()[1:], strict=True):
            if not file.exists():
                _sparse(file, disk.size)
        if self.root.exists():
            return
        staged = self.root.with_suffix(".new")
        copy_sparse(base, staged)
        image.write_files(staged, files)
        staged.replace(self.root)

    def power_on(self) -> None:
        if self.sound():
            return
        self.process.kill()
        sockets = self.folder / "uml"
        shutil.rmtree(sockets, ignore_errors=True)
        sockets.mkdir()
        self.namespace.plug_cable(self.cable_name)
        program = kernel.folder(image.cache_folder()) / "linux.uml"
        if self.enrolled.exists():
            program = self.enrolled
        command = [str(program), f"umid={self.host.name}", "uml_dir=uml", f"mem={self.host.memory >> 20}M"]
        # How it follows its processes; where filters cannot be set, by ptrace.
        command += ["seccomp=auto", "root=/dev/ubda", "rw", "quiet", "ubd0=root.img"]
        for index, (disk, file) in enumerate(zip(self.host.disks, self.disks()[1:], strict=True), start=1):
            command.append(f"ubd{index}={file.name},,{disk.serial}")
        if self.stick.exists():
            command.append(f"{STICK}r={self.stick.name},,{STICK_SERIAL}")
        # Room for what the bridge has not cut into packets; without it that is lost, and TCP crawls.
        command += [f"vec0:transport=tap,ifname={self.cable_name},mac={mac(self.host.address)},gro=1"]
        # The console is the descriptor 1, a pipe; nothing listens on the others.
        command += ["con=null", "con0=null,fd:1", "ssl=null"]
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin"),
            "TMPDIR": str(self._memory_folder()),
        }
        self.group.create()
        enter = ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.group.path / "cgroup.procs")]
        self.process.start(
            [*enter, *self.namespace.command(*command)],
            cwd=self.folder,
            log=self.console,
            environment=environment,
            pipe_output=True,
        )

    def _memory_folder(self) -> Path:
        """Folder of its memory file: a tmpfs with space for all hosts that are off, else a disk (slower)."""
        shared = Path("/dev/shm")  # noqa: S108 -- the kernel unlinks its file as soon as it is open
        siblings = self.folder.parent
        needed = sum(
            host.memory
            for host in self.lab.hosts
            if host.kind == self.kind
            and Daemon(siblings / host.name / self.process.record.name).pid() is None
        )
        if shared.is_dir() and shutil.disk_usage(shared).free > needed * 11 // 10:
            return shared
        folder = self.folder / "memory"
        folder.mkdir(exist_ok=True)
        return folder

    def power_off(self) -> None:
        """Cut its power: no shutdown, and unflushed writes are lost."""
        self.process.kill()

    def mconsole(self, request: str) -> str:
        """Send a command to the kernel's management console, the only way to plug a disk into a running host.

        It replies to an abstract socket, which exists per network namespace, so the caller must be inside.
        """
        socket_path = f"uml/{self.host.name}/mconsole"
        done = subprocess.run(
            self.namespace.command("timeout", "20", "uml_mconsole", socket_path, *request.split()),
            cwd=self.folder,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode or "ERR" in done.stdout:
            answer = done.stdout.strip() or f"no answer ({done.returncode})"
            raise LabError(f"{self.host.name} refused `{request}`: {answer}")
        return done.stdout.strip()

    def plug(self, source: Path) -> None:
        """Until the next power-on the medium is identified by its label only: the management console takes no serial."""
        staged = self.folder / "stick.new"
        if source.is_dir():
            write_stick(source, staged)
        else:
            shutil.copyfile(source, staged)
        running = self.running()
        if running:
            try:
                self.mconsole(f"remove {STICK}")
            except LabError as error:
                if "doesn't exist" not in str(error):
                    raise LabError(f"{error}; unmount the medium on {self.host.name} first") from None
        staged.replace(self.stick)
        if running:
            self.mconsole(f"config {STICK}r={self.stick.name}")

    def enrol(self, certificate: Path) -> None:
        kernel.enrol(kernel.folder(image.cache_folder()), certificate.resolve(), self.enrolled)

    def snapshot(self, name: str) -> None:
        """Writes that the host has not synced are not included."""
        target = self.snapshots / name
        staged = self.snapshots / f"{name}.new"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        # The kernel's own way to stand still: SIGSTOP and SIGCONT make its processes fault now and then.
        running = self.running()
        if running:
            self.mconsole("stop")
        try:
            for disk in self.disks():
                copy_sparse(disk, staged / disk.name)
        finally:
            if running:
                self.mconsole("go")
        shutil.rmtree(target, ignore_errors=True)
        staged.replace(target)

    def restore(self, name: str) -> None:
        source = self.require_snapshot(name)
        for disk in self.disks():
            staged = disk.with_suffix(".new")
            copy_sparse(source / disk.name, staged)
            staged.replace(disk)

    def take_over(self, other: Machine, name: str) -> None:
        """A container's becomes its root disk, and the others are blank."""
        staged = self.snapshots / f"{name}.new"
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(other, Container):
            staged.mkdir(parents=True)
            with other.tree(name) as root:
                image.write_disk(root, staged / self.root.name, lambda _: None)
            for disk, file in zip(self.host.disks, self.disks()[1:], strict=True):
                _sparse(staged / file.name, disk.size)
        else:
            shutil.copytree(other.require_snapshot(name), staged, copy_function=copy_sparse)
        shutil.rmtree(self.snapshots / name, ignore_errors=True)
        staged.replace(self.snapshots / name)


def _sparse(file: Path, size: int) -> None:
    staged = file.with_suffix(".new")
    with staged.open("wb") as handle:
        handle.truncate(size)
    staged.replace(file)


def write_stick(folder: Path, target: Path) -> None:
    """Write an ext4 image with the content of a folder, labelled LLMKEEP."""
    files = list(folder.rglob("*"))
    payload = sum(path.lstat().st_size for path in files if path.is_file() and not path.is_symlink())
    size = (payload + len(files) * 8192) * 21 // 20 + (32 << 20)
    with target.open("wb") as handle:
        handle.truncate(size)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-L", "LLMKEEP", "-O", "^has_journal"]
    make += ["-N", str(len(files) + 64), "-E", "lazy_itable_init=0,root_owner=0:0", "-d", str(folder)]
    make.append(str(target))
    # A file that no manifest names would make the bundle a tampered one.
    tidy = ["debugfs", "-w", "-R", "rmdir lost+found", str(target)]
    for command in (make, tidy):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            target.unlink(missing_ok=True)
            raise LabError(f"could not write the medium: {done.stderr.strip()}")
