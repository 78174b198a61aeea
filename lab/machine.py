"""One host of the lab, independent of its kind: name, keys, network cable, power."""

import contextlib
import socket
import subprocess
import time
import uuid
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lab import cgroup
from lab.cgroup import Group
from lab.errors import LabError
from lab.image import Report
from lab.inventory import Host, Lab
from lab.network import Namespace
from lab.process import Daemon

BOOT_SECONDS = 90.0  # a container takes 1 to 2 on an idle machine, a kernel 6 to 12
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


class Machine(ABC):
    """A host with its folder. Each kind implements creation, start, snapshot and restore."""

    kind: ClassVar[str]
    # What `mount` is given to see the medium: the source, and the options.
    stick_source: ClassVar[tuple[str, str]]

    def __init__(self, host: Host, lab: Lab, folder: Path, namespace: Namespace) -> None:
        self.host = host
        self.lab = lab
        self.folder = folder
        self.namespace = namespace
        self.console = folder / "console.log"
        self.snapshots = folder / "snapshots"
        self.process = Daemon(folder / "process.json")

    @cached_property
    def group(self) -> Group:
        """Control group of all its processes."""
        return Group(cgroup.mount_point() / self.namespace.name / self.host.name)

    @staticmethod
    @abstractmethod
    def base(report: Report) -> Path:
        """The base image of this kind of host, built if it is not cached."""

    @property
    @abstractmethod
    def cable_name(self) -> str:
        """Name of its network interface in the lab's namespace."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether it was created."""

    @abstractmethod
    def create(self, base: Path, files: dict[str, tuple[bytes, int]]) -> None:
        """Create it from the bare Debian `base` with these files (path: content and mode), unless it exists."""

    @abstractmethod
    def power_on(self) -> None:
        """Start it with its cable plugged in, unless it is sound."""

    @abstractmethod
    def power_off(self) -> None:
        """Cut its power, without a shutdown."""

    @abstractmethod
    def has_stick(self) -> bool:
        """Whether a medium is plugged in."""

    @abstractmethod
    def plug(self, source: Path) -> None:
        """Plug a folder or an ext4 image in as a medium, now if it is running, else at the next power-on."""

    def enrol(self, certificate: Path) -> None:
        """Have its kernel trust a certificate (DER) for modules, from the next power-on. LabError if it has no kernel."""
        raise LabError(f"{self.host.name} is a {self.kind}, which has no kernel to trust {certificate.name}")

    @abstractmethod
    def snapshot(self, name: str) -> None:
        """Keep a copy of its disks, taken at one instant."""

    @abstractmethod
    def restore(self, name: str) -> None:
        """Restore the disks of a snapshot; the host must be off."""

    @abstractmethod
    def take_over(self, other: "Machine", name: str) -> None:
        """Take a snapshot of the same host from another lab, which may be running, and may be destroyed afterwards."""

    @abstractmethod
    def disk_bytes(self) -> int:
        """Bytes that its disks occupy on this machine, without snapshots."""

    def running(self) -> bool:
        """Whether it has power."""
        return self.process.pid() is not None

    def sound(self) -> bool:
        """Whether it has power and an interface in this namespace; otherwise it must be started again."""
        return self.namespace.holds(self.process.pid()) and self.cable_name in self.namespace.links()

    def identity_files(
        self, known_hosts: str, authorized: str, operator_key: bytes
    ) -> dict[str, tuple[bytes, int]]:
        """Files that give a bare Debian this host's name, address and keys, each with its mode."""
        name = self.host.name
        network = NETWORK.format(
            address=self.host.address, prefix=self.lab.network.prefixlen, gateway=self.lab.gateway
        )
        files = {
            "/etc/hostname": (f"{name}\n".encode(), 0o644),
            "/etc/hosts": (f"127.0.0.1 localhost\n127.0.1.1 {name}\n".encode(), 0o644),
            "/etc/machine-id": (f"{uuid.uuid4().hex}\n".encode(), 0o444),
            "/etc/resolv.conf": (f"nameserver {self.lab.gateway}\n".encode(), 0o644),
            "/etc/systemd/network/10-vec0.network": (network.encode(), 0o644),
            "/etc/ssh/ssh_host_ed25519_key": (self.host_key().read_bytes(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (self.host_key().with_suffix(".pub").read_bytes(), 0o644),
            "/root/.ssh/authorized_keys": (authorized.encode(), 0o600),
        }
        if "control" in self.host.groups:
            files["/root/.ssh/id_ed25519"] = (operator_key, 0o600)
            files["/etc/ssh/ssh_known_hosts"] = (known_hosts.encode(), 0o644)
        return files

    def host_key(self) -> Path:
        """Its SSH host key, generated on first use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return make_key(self.folder / "ssh_host_ed25519_key", f"root@{self.host.name}")

    def public_key(self) -> str:
        """Type and public part of its SSH host key."""
        return " ".join(self.host_key().with_suffix(".pub").read_text(encoding="ascii").split()[:2])

    def wait_for_ssh(self, seconds: float = BOOT_SECONDS) -> None:
        """Wait until its sshd answers; LabError with the end of its console if it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running():
                raise LabError(f"{self.host.name} has gone down while it booted:\n{self.last_words()}")
            if self.namespace.within(self._greets):
                return
            time.sleep(0.1)
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

    def cut(self) -> None:
        """Unplug its network cable."""
        self.namespace.detach(self.cable_name)

    def join(self) -> None:
        """Plug its network cable back in."""
        self.namespace.attach(self.cable_name)

    def cable(self) -> bool:
        """Whether its network cable is plugged in."""
        return self.namespace.attached(self.cable_name)

    def snapshot_names(self) -> list[str]:
        """Names of its complete snapshots."""
        return sorted(path.name for path in self.snapshots.glob("*") if path.suffix != ".new")

    def require_snapshot(self, name: str) -> Path:
        """The folder of a snapshot; LabError with the existing names if there is none."""
        source = self.snapshots / name
        if not source.is_dir():
            known = ", ".join(self.snapshot_names()) or "none"
            raise LabError(f"{self.host.name} has no snapshot {name!r}: it has {known}")
        return source

    def last_words(self, lines: int = 12) -> str:
        """The last lines of its console."""
        with contextlib.suppress(FileNotFoundError):
            text = self.console.read_text(encoding="utf-8", errors="replace")
            return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])
        return "  (its console is empty)"


def make_key(path: Path, comment: str) -> Path:
    """Generate an SSH key pair at `path` and `path.pub` unless it exists."""
    if not path.with_suffix(".pub").exists() or not path.exists():
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path
