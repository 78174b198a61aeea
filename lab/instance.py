"""All hosts of a lab together, and what stands between them: one instance of one checkout."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lab import image
from lab.errors import AlreadyUp, Busy, LabError, NotUp
from lab.host import Machine, copy_sparse, make_key
from lab.image import Report
from lab.inventory import Lab, read
from lab.network import BRIDGE, Namespace
from lab.process import Daemon
from lab.requirements import allow_mappings, require_memory, require_programs, require_root, require_space

CHECKOUT = Path(__file__).resolve().parent.parent


class Instance:
    """One lab: the checkout may have several, each under a name of its own."""

    def __init__(self, name: str, inventories: Sequence[Path] = (), checkout: Path = CHECKOUT) -> None:
        self.name = name
        self.checkout = checkout
        self.folder = checkout / ".lab" / "instances" / name
        self.identity = hashlib.sha256(f"{checkout}\0{name}".encode()).hexdigest()[:8]
        self.namespace = Namespace(f"llmkeep-{self.identity}")
        self.sockets = Path("/run") / f"llmkeep-{self.identity}"  # short enough for a socket's path
        self.sink_file = self.folder / "sink.jsonl"
        self.sink = Daemon(self.folder / "sink.json")
        self.forwarder = Daemon(self.folder / "forward.json")
        # `.lab/env` belongs to the lab that people use; the others keep theirs to themselves.
        self.env_file = checkout / ".lab" / "env" if name == "lab" else self.folder / "env"
        self.known_hosts = self.folder / "known_hosts"
        self.developer_key = self.folder / "developer_key"
        self.operator_key = self.folder / "operator_key"
        self._chosen = self.folder / "inventories.json"
        self.inventories = list(inventories) or self._inventories_of_last_up()
        self.lab: Lab = read(self.inventories)
        self.machines = [
            Machine(host, self.lab, self.folder / "hosts" / host.name, self.namespace)
            for host in self.lab.hosts
        ]

    def _inventories_of_last_up(self) -> list[Path]:
        if self._chosen.exists():
            return [self.checkout / path for path in json.loads(self._chosen.read_text(encoding="utf-8"))]
        return [self.checkout / "inventory" / "lab"]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the instance: Busy if another command does. The kernel lets go of it with this process."""
        require_root()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another lab command is changing {self.name!r}: wait for it, or end it") from None
            yield

    def machine(self, name: str) -> Machine:
        """The machine of that name."""
        self.lab.host(name)
        return next(machine for machine in self.machines if machine.host.name == name)

    def is_up(self) -> bool:
        """Whether every part of it runs."""
        return (
            self.namespace.holds(self.sink.pid())
            and BRIDGE in self.namespace.links()
            and all(machine.sound() for machine in self.machines)
        )

    def up(self, report: Report) -> None:
        """Start what does not run; AlreadyUp where everything does."""
        if self.is_up() and all(machine.answers() for machine in self.machines if machine.cable()):
            raise AlreadyUp(f"lab {self.name!r} is up: `lab status` shows it, `lab down` stops it")
        starting = [machine for machine in self.machines if not machine.sound()]
        require_programs()
        allow_mappings()
        require_memory(starting)
        require_space(self.folder, starting)
        base = image.base_image(report)
        stored = [os.path.relpath(path.resolve(), self.checkout) for path in self.inventories]
        self._chosen.write_text(json.dumps(stored), encoding="utf-8")
        self._make_keys()
        for machine in self.machines:
            if not machine.root.exists():
                report(f"unpacking {machine.host.name}")
            machine.create_disks(
                base,
                known_hosts=self.known_hosts.read_text(encoding="ascii"),
                authorized="".join(
                    key.with_suffix(".pub").read_text(encoding="ascii")
                    for key in (self.operator_key, self.developer_key)
                ),
                operator_key=self.operator_key.read_bytes(),
            )
        self.start_network()
        memory = self.memory_folder(starting)
        for machine in starting:
            report(f"starting {machine.host.name}")
            machine.power_on(memory)
        for machine in self.machines:
            if machine.cable():
                report(f"waiting for {machine.host.name}")
                machine.wait_for_ssh()

    def start_network(self) -> None:
        """The namespace, its bridge and the sink."""
        bridge_is_new = not (self.namespace.exists() and BRIDGE in self.namespace.links())
        self.namespace.create(self.lab)
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        for machine in self.machines:
            if bridge_is_new and machine.tap in self.namespace.links():
                self.namespace.attach(machine.tap)
        if not self.namespace.holds(self.sink.pid()) or bridge_is_new:
            self.sink.kill()
            inside = [self.lab.seat, *(host.address for host in self.lab.hosts)]
            self.sink.start(
                self.namespace.command(
                    sys.executable,
                    "-m",
                    "lab.sink",
                    "--interface",
                    BRIDGE,
                    "--gateway",
                    self.lab.gateway,
                    "--file",
                    str(self.sink_file),
                    "--inside",
                    *inside,
                ),
                cwd=self.checkout,
                log=self.folder / "sink.log",
            )

    def _make_keys(self) -> None:
        make_key(self.developer_key, "developer@lab")
        make_key(self.operator_key, "operator@lab")
        lines = [
            f"{machine.host.name},{machine.host.address} {machine.public_key()}\n"
            for machine in self.machines
        ]
        self.known_hosts.write_text("".join(lines), encoding="ascii")

    def memory_folder(self, machines: Sequence[Machine]) -> Path:
        """Where the hosts' memory lives: a tmpfs if it is large enough, else a file on disk (slower)."""
        shared = Path("/dev/shm")  # noqa: S108 -- the kernel unlinks its file as soon as it is open
        needed = sum(machine.host.memory for machine in machines)
        if shared.is_dir() and shutil.disk_usage(shared).free > needed * 11 // 10:
            return shared
        folder = self.folder / "memory"
        folder.mkdir(exist_ok=True)
        return folder

    def down(self) -> None:
        """Stop everything; disks and snapshots stay. Heals a lab of which only parts are left."""
        for daemon in [self.forwarder, *self._left_over_daemons(), self.sink]:
            daemon.kill()
        self.namespace.delete()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def destroy(self) -> bool:
        """Stop everything and throw it away, snapshots included. False where there was nothing."""
        there = self.namespace.exists() or any(entry.name != "lock" for entry in self.folder.iterdir())
        self.down()
        for entry in self.folder.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.env_file.unlink(missing_ok=True)
        return there

    def copy_from(self, source: "Instance", snapshot: str) -> None:
        """Begin with the keys and snapshots of another lab, and its disks as one snapshot of it has them."""
        for machine in source.machines:
            machine.require_snapshot(snapshot)
        lab_wide = [source.known_hosts, source._chosen]
        lab_wide += [
            path for key in (source.developer_key, source.operator_key) for path in _both_halves(key)
        ]
        _copy_files(lab_wide, self.folder)
        for machine in source.machines:
            folder = self.folder / "hosts" / machine.host.name
            shutil.copytree(machine.snapshots, folder / "snapshots", copy_function=copy_sparse)
            _copy_files(_both_halves(machine.host_key()), folder)
            for disk in (machine.snapshots / snapshot).iterdir():
                copy_sparse(disk, folder / disk.name)

    def _left_over_daemons(self) -> list[Daemon]:
        """Every process that was recorded for a host, also for hosts that the inventory no longer has."""
        return [Daemon(record) for record in sorted(self.folder.glob("hosts/*/*.json"))]

    def require_up(self) -> None:
        """NotUp where there is no namespace to enter."""
        if not self.namespace.exists():
            raise NotUp(f"lab {self.name!r} is not up: `lab up` starts it")

    def environment(self) -> dict[str, str]:
        """What a command inside the namespace needs to reach the hosts by SSH, Ansible's included.

        Two labs of one machine use the same addresses: each has control sockets of its own, and a memory
        of its own of what molecule has created.
        """
        known = f"-o UserKnownHostsFile={self.known_hosts} -o GlobalKnownHostsFile=/dev/null"
        return {
            **os.environ,
            "LAB_INSTANCE": self.name,
            "ANSIBLE_PRIVATE_KEY_FILE": str(self.developer_key),
            "ANSIBLE_SSH_COMMON_ARGS": known,
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.sockets),
            "ANSIBLE_SSH_CONTROL_PATH": "%(directory)s/%%h-%%r",
            "MOLECULE_EPHEMERAL_DIRECTORY": str(self.folder / "molecule"),
        }

    def ssh(self, machine: Machine, *command: str) -> list[str]:
        """The command line that runs a command on a host, or a shell."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "10",  # a host without power must not hold a command for minutes
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
        }
        given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        where = f"root@{machine.host.address}"
        return self.namespace.command(
            "ssh", "-F", "none", "-i", str(self.developer_key), *given, where, *command
        )

    def settle(self, machine: Machine) -> None:
        """Ask a running host to write everything to its disks."""
        command = self.ssh(machine, "sync")
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            name = machine.host.name
            raise LabError(
                f"{name} could not sync: {error}; `lab power-off {name}` first takes it as it is"
            ) from None

    def restore_all(self, name: str, terminal: Console) -> None:
        """Put a snapshot of every host back and power it on."""
        for machine in self.machines:
            machine.require_snapshot(name)
        with terminal.status(f"putting back snapshot {name}"):
            for machine in self.machines:
                self.forget_connections(machine)
                machine.power_off()
                machine.restore(name)
                machine.power_on(self.memory_folder([machine]))
            for machine in self.machines:
                machine.wait_for_ssh()

    def forget_connections(self, machine: Machine) -> None:
        """End Ansible's kept connections to a host that is about to lose its power."""
        for path in self.sockets.glob(f"{machine.host.address}-*"):
            command = ["ssh", "-F", "none", "-o", f"ControlPath={path}", "-O", "exit", machine.host.address]
            subprocess.run(command, check=False, capture_output=True, timeout=10)
            path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """What there is and what runs, for people and machines."""
        exists = self.namespace.exists()
        hosts = {}
        for machine in self.machines:
            running = machine.running()
            hosts[machine.host.name] = {
                "address": machine.host.address,
                "groups": sorted(machine.host.groups - {"all"}),
                "memory": machine.host.memory,
                "power": running,
                "cable": exists and machine.cable(),
                "ssh": machine.answers(),
                "stick": machine.stick.exists(),
                "snapshots": sorted(
                    path.name for path in machine.snapshots.glob("*") if path.suffix != ".new"
                ),
                "disk_bytes": sum(file.stat().st_blocks * 512 for file in machine.disks() if file.exists()),
            }
        return {
            "instance": self.name,
            "namespace": self.namespace.name if exists else None,
            "up": self.is_up(),
            "sink": self.sink.pid() is not None,
            "open": self.forwarder.pid() is not None,
            "hosts": hosts,
        }


def _both_halves(key: Path) -> list[Path]:
    return [key, key.with_suffix(".pub")]


def _copy_files(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy2(file, folder)


def plug(machine: Machine, source: Path) -> None:
    """Make `source` (an ext4 image, or a folder) the stick of a host."""
    staged = machine.folder / "stick.new"
    if source.is_dir():
        write_stick(source, staged)
    elif source.is_file():
        shutil.copyfile(source, staged)
    else:
        raise LabError(f"there is nothing to plug at {source}: name a folder or a disk image")
    machine.plug(staged)


def write_stick(folder: Path, target: Path) -> None:
    """An ext4 image with the content of a folder, labelled LLMKEEP."""
    files = list(folder.rglob("*"))
    payload = sum(path.lstat().st_size for path in files if path.is_file() and not path.is_symlink())
    size = (payload + len(files) * 8192) * 21 // 20 + (32 << 20)
    with target.open("wb") as handle:
        handle.truncate(size)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-L", "LLMKEEP", "-O", "^has_journal"]
    make += [
        "-N",
        str(len(files) + 64),
        "-E",
        "lazy_itable_init=0,root_owner=0:0",
        "-d",
        str(folder),
        str(target),
    ]
    # A file that no manifest names would make the bundle a tampered one.
    tidy = ["debugfs", "-w", "-R", "rmdir lost+found", str(target)]
    for command in (make, tidy):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            target.unlink(missing_ok=True)
            raise LabError(f"could not write the stick: {done.stderr.strip()}")
