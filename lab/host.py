"""One machine of the lab: its disks, its cable, its power."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

from lab import image, kernel
from lab.errors import LabError
from lab.inventory import Host, Lab
from lab.network import Namespace, mac, tap
from lab.process import Daemon

STICK = "ubd15"  # /dev/ubdp
STICK_SERIAL = "LLMKEEP-STICK"
BOOT_SECONDS = 90.0  # 6 to 12 on an idle machine
NETWORK = """[Match]
Name=vec0

[Network]
Address={address}/{prefix}
Gateway={gateway}
DNS={gateway}
# Nothing leaves the host unasked: what the sink records was meant.
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


class Machine:
    """A host with a folder for its disks, processes and console."""

    def __init__(self, host: Host, lab: Lab, folder: Path, namespace: Namespace) -> None:
        self.host = host
        self.lab = lab
        self.folder = folder
        self.namespace = namespace
        self.root = folder / "root.img"
        self.stick = folder / "stick.img"
        self.console = folder / "console.log"
        self.snapshots = folder / "snapshots"
        self.kernel = Daemon(folder / "kernel.json")

    @property
    def tap(self) -> str:
        """Its cable."""
        return tap(self.host.address)

    def running(self) -> bool:
        """Whether it has power."""
        return self.kernel.pid() is not None

    def sound(self) -> bool:
        """Whether it has power, and a tap in this namespace: else only a new start helps."""
        return self.namespace.holds(self.kernel.pid()) and self.tap in self.namespace.links()

    def disks(self) -> list[Path]:
        """Every disk that is its own, the root disk first; the stick is not."""
        return [self.root, *(self.folder / f"{disk.serial}.img" for disk in self.host.disks)]

    def create_disks(self, base: Path, known_hosts: str, authorized: str, operator_key: bytes) -> None:
        """Its disks as they come out of the box: a bare Debian that knows its name, blank data disks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for disk, file in zip(self.host.disks, self.disks()[1:], strict=True):
            if not file.exists():
                _sparse(file, disk.size)
        if self.root.exists():
            return
        name = self.host.name
        files = {
            "/etc/hostname": (f"{name}\n".encode(), 0o644),
            "/etc/hosts": (f"127.0.0.1 localhost\n127.0.1.1 {name}\n".encode(), 0o644),
            "/etc/machine-id": (f"{uuid.uuid4().hex}\n".encode(), 0o444),
            "/etc/resolv.conf": (f"nameserver {self.lab.gateway}\n".encode(), 0o644),
            "/etc/systemd/network/10-vec0.network": (
                NETWORK.format(
                    address=self.host.address, prefix=self.lab.network.prefixlen, gateway=self.lab.gateway
                ).encode(),
                0o644,
            ),
            "/etc/ssh/ssh_host_ed25519_key": (self.host_key().read_bytes(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (self.host_key().with_suffix(".pub").read_bytes(), 0o644),
            "/root/.ssh/authorized_keys": (authorized.encode(), 0o600),
        }
        if "control" in self.host.groups:
            files["/root/.ssh/id_ed25519"] = (operator_key, 0o600)
            files["/etc/ssh/ssh_known_hosts"] = (known_hosts.encode(), 0o644)
        staged = self.root.with_suffix(".new")
        copy_sparse(base, staged)
        image.write_files(staged, files)
        staged.replace(self.root)

    def host_key(self) -> Path:
        """Its SSH host key, made when first asked for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return make_key(self.folder / "ssh_host_ed25519_key", f"root@{self.host.name}")

    def public_key(self) -> str:
        """Type and public half of its SSH host key."""
        return " ".join(self.host_key().with_suffix(".pub").read_text(encoding="ascii").split()[:2])

    def power_on(self, memory_folder: Path) -> None:
        """Start it, with its cable; nothing where it runs."""
        if self.sound():
            return
        self.kernel.kill()
        sockets = self.folder / "uml"
        shutil.rmtree(sockets, ignore_errors=True)
        sockets.mkdir()
        self.namespace.plug_cable(self.tap)
        program = kernel.folder(image.cache_folder()) / "linux.uml"
        command = [str(program), f"umid={self.host.name}", "uml_dir=uml", f"mem={self.host.memory >> 20}M"]
        # How it follows its processes; where filters cannot be set, by ptrace.
        command += ["seccomp=auto", "root=/dev/ubda", "rw", "quiet", "pty.legacy_count=0", "ubd0=root.img"]
        for index, (disk, file) in enumerate(zip(self.host.disks, self.disks()[1:], strict=True), start=1):
            command.append(f"ubd{index}={file.name},,{disk.serial}")
        if self.stick.exists():
            command.append(f"{STICK}r={self.stick.name},,{STICK_SERIAL}")
        # Room for what the bridge has not cut into packets; without it that is lost, and TCP crawls.
        command += [f"vec0:transport=tap,ifname={self.tap},mac={mac(self.host.address)},gro=1"]
        # The console is the descriptor 1, a pipe; nothing listens on the others.
        command += ["con=null", "con0=null,fd:1", "ssl=null"]
        environment = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin"), "TMPDIR": str(memory_folder)}
        self.kernel.start(
            self.namespace.command(*command),
            cwd=self.folder,
            log=self.console,
            environment=environment,
            pipe_output=True,
        )

    def wait_for_ssh(self, seconds: float = BOOT_SECONDS) -> None:
        """Until its sshd answers; LabError with the end of its console if it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running():
                raise LabError(f"{self.host.name} has gone down while it booted:\n{self.last_words()}")
            if self.namespace.within(self._greets):
                return
            time.sleep(0.2)
        raise LabError(f"{self.host.name} does not answer after {seconds:.0f} s:\n{self.last_words()}")

    def answers(self) -> bool:
        """Whether its sshd answers now."""
        return self.running() and self.namespace.exists() and self.namespace.within(self._greets)

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.host.address, 22), timeout=2.0) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def power_off(self) -> None:
        """Take its power away: no shutdown, nothing is written that was not."""
        self.kernel.kill()

    def cut(self) -> None:
        """Take its cable out."""
        self.namespace.detach(self.tap)

    def join(self) -> None:
        """Put its cable back in."""
        self.namespace.attach(self.tap)

    def cable(self) -> bool:
        """Whether its cable is in."""
        return self.namespace.attached(self.tap)

    def mconsole(self, request: str) -> str:
        """Ask the kernel's management console, the only way to plug a disk into a running host.

        It answers to an abstract socket of the asker's: asked from outside the namespace, it is never heard.
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

    def plug(self, stick: Path) -> None:
        """Make an ext4 image (which is moved) its stick, at once where it runs, else at the next power-on.

        The management console takes no serial: until the next power-on the stick is known by its label only.
        """
        running = self.running()
        if running:
            try:
                self.mconsole(f"remove {STICK}")
            except LabError as error:
                if "doesn't exist" not in str(error):
                    raise LabError(f"{error}; unmount the stick on {self.host.name} first") from None
        stick.replace(self.stick)
        if running:
            self.mconsole(f"config {STICK}r={self.stick.name}")

    def snapshot(self, name: str) -> None:
        """Keep a copy of its disks, taken at one instant. What it had not synced is not in it."""
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

    def snapshot_names(self) -> list[str]:
        """The snapshots there are, complete ones only."""
        return sorted(path.name for path in self.snapshots.glob("*") if path.suffix != ".new")

    def require_snapshot(self, name: str) -> Path:
        """The folder of a snapshot; LabError with the names there are."""
        source = self.snapshots / name
        if not source.is_dir():
            known = ", ".join(self.snapshot_names()) or "none"
            raise LabError(f"{self.host.name} has no snapshot {name!r}: it has {known}")
        return source

    def restore(self, name: str) -> None:
        """Put the disks of a snapshot back; it must be off."""
        source = self.require_snapshot(name)
        for disk in self.disks():
            staged = disk.with_suffix(".new")
            copy_sparse(source / disk.name, staged)
            staged.replace(disk)

    def last_words(self, lines: int = 12) -> str:
        """The end of its console."""
        with contextlib.suppress(FileNotFoundError):
            text = self.console.read_text(encoding="utf-8", errors="replace")
            return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])
        return "  (its console is empty)"


def make_key(path: Path, comment: str) -> Path:
    """An SSH key pair at `path` and `path.pub`, made if it is not there."""
    if not path.with_suffix(".pub").exists() or not path.exists():
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def _sparse(file: Path, size: int) -> None:
    staged = file.with_suffix(".new")
    with staged.open("wb") as handle:
        handle.truncate(size)
    staged.replace(file)


def copy_sparse(source: Path | str, target: Path | str) -> None:
    """Copy a sparse file; holes stay holes."""
    done = subprocess.run(
        ["cp", "--sparse=auto", "--reflink=auto", str(source), str(target)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        Path(target).unlink(missing_ok=True)
        raise LabError(f"could not copy {source}: {done.stderr.strip()}; is the disk full?")
