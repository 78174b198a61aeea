"""All hosts of a lab and their network: one instance of one checkout."""

import contextlib
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

from lab import cgroup
from lab.cgroup import Group
from lab.container import Container, forget_layers, layers_of, locked
from lab.errors import AlreadyUp, Busy, LabError, NotUp, Unsupported
from lab.image import Report
from lab.inventory import Lab, read
from lab.machine import Machine, make_key
from lab.network import BRIDGE, Namespace
from lab.process import Daemon
from lab.requirements import (
    allow_mappings,
    capabilities,
    require_kinds,
    require_memory,
    require_root,
    require_space,
)
from lab.steps import Steps
from lab.user_mode import UserModeKernel

CHECKOUT = Path(__file__).resolve().parent.parent
KINDS: dict[str, type[Machine]] = {kind.kind: kind for kind in (Container, UserModeKernel)}


def identity(name: str, checkout: Path = CHECKOUT) -> str:
    """What names of this lab's namespace, sockets and control group end in."""
    return hashlib.sha256(f"{checkout}\0{name}".encode()).hexdigest()[:8]


class Instance:
    """One lab; a checkout may have several, each with its own name."""

    def __init__(self, name: str, inventories: Sequence[Path] = (), checkout: Path = CHECKOUT) -> None:
        self.name = name
        self.checkout = checkout
        self.folder = checkout / ".lab" / "instances" / name
        self.identity = identity(name, checkout)
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
            KINDS[host.kind](host, self.lab, self.folder / "hosts" / host.name, self.namespace)
            for host in self.lab.hosts
        ]

    def _inventories_of_last_up(self) -> list[Path]:
        if self._chosen.exists():
            return [self.checkout / path for path in json.loads(self._chosen.read_text(encoding="utf-8"))]
        return [self.checkout / "inventory" / "lab"]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Lock the instance for changes; Busy if another command holds it. The lock ends with this process."""
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
        """Whether every part of it is running."""
        return (
            self.namespace.holds(self.sink.pid())
            and BRIDGE in self.namespace.links()
            and all(machine.sound() for machine in self.machines)
        )

    def up(self, report: Report) -> None:
        """Start every part that is not running; AlreadyUp if all are."""
        if self.is_up() and all(machine.answers() for machine in self.machines if machine.cable()):
            raise AlreadyUp(f"lab {self.name!r} is up: `lab status` shows it, `lab down` stops it")
        starting = [machine for machine in self.machines if not machine.sound()]
        self._require_one_kind()
        require_kinds(self.machines, self.folder)
        if any(machine.kind == UserModeKernel.kind for machine in starting):
            allow_mappings()
        require_memory(starting)
        require_space(self.folder, self.machines)

        stored = [os.path.relpath(path.resolve(), self.checkout) for path in self.inventories]
        self._chosen.write_text(json.dumps(stored), encoding="utf-8")
        self._make_keys()
        for machine in self.machines:
            if not machine.exists():
                base = machine.base(report)
                report(f"unpacking {machine.host.name}")
                machine.create(base, self._identity(machine))
        self.start_network()
        for machine in starting:
            report(f"starting {machine.host.name}")
            self.forget_connections(machine.host.address)
            machine.power_on()
        for machine in self.machines:
            if machine.cable():
                report(f"waiting for {machine.host.name}")
                machine.wait_for_ssh()

    def start_network(self) -> None:
        """Start the namespace, its bridge and the sink."""
        bridge_is_new = not (self.namespace.exists() and BRIDGE in self.namespace.links())
        self.namespace.create(self.lab)
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        for machine in self.machines:
            if bridge_is_new and machine.cable_name in self.namespace.links():
                self.namespace.attach(machine.cable_name)
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

    def _identity(self, machine: Machine) -> dict[str, tuple[bytes, int]]:
        keys = (self.operator_key, self.developer_key)
        return machine.identity_files(
            known_hosts=self.known_hosts.read_text(encoding="ascii"),
            authorized="".join(key.with_suffix(".pub").read_text(encoding="ascii") for key in keys),
            operator_key=self.operator_key.read_bytes(),
        )

    def _require_one_kind(self) -> None:
        """LabError if a host exists as another kind."""
        for machine in self.machines:
            for kind in KINDS.values():
                other = kind(machine.host, self.lab, machine.folder, self.namespace)
                if kind.kind != machine.kind and other.exists():
                    raise LabError(
                        f"{machine.host.name} is a {kind.kind} in lab {self.name!r}, and the inventory wants a "
                        f"{machine.kind}: `lab destroy` first, or use another lab (--instance NAME)"
                    )

    def down(self) -> None:
        """Stop everything and keep disks and snapshots; also cleans up a lab of which only parts are left."""
        for group in self._left_over_groups():
            group.kill()
        for daemon in [self.forwarder, *self._left_over_daemons(), self.sink]:
            daemon.kill()
        for group in self._left_over_groups():
            group.remove()
        self.forget_connections("*")
        self.namespace.delete()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def destroy(self) -> bool:
        """Stop everything and delete it, snapshots included; False if there was nothing."""
        there = self.namespace.exists() or any(entry.name != "lock" for entry in self.folder.iterdir())
        self.down()
        with locked(layers_of(self.folder.parent), fcntl.LOCK_SH):
            for entry in self.folder.iterdir():
                if entry.name == "lock":
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        forget_layers(self.folder.parent)
        self.env_file.unlink(missing_ok=True)
        return there

    def copy_from(self, source: "Instance", snapshot: str) -> None:
        """Copy keys and snapshots of the same hosts from another lab, and restore the disks of one of those snapshots."""
        for machine in source.machines:
            machine.require_snapshot(snapshot)
        keys = [path for key in (source.developer_key, source.operator_key) for path in _both_halves(key)]
        _copy_files([source.known_hosts, *keys], self.folder)
        for machine in self.machines:
            theirs = source.machine(machine.host.name)
            _copy_files(_both_halves(theirs.host_key()), machine.folder)
            for name in theirs.snapshot_names():
                machine.take_over(theirs, name)
            machine.restore(snapshot)

    def _left_over_groups(self) -> list[Group]:
        """Control groups of all hosts, including those of hosts that are no longer in the inventory."""
        with contextlib.suppress(Unsupported):
            group = Group(cgroup.mount_point() / self.namespace.name)
            return [group] if group.path.exists() else []
        return []

    def _left_over_daemons(self) -> list[Daemon]:
        """All recorded processes, including those of hosts that are no longer in the inventory."""
        return [Daemon(record) for record in sorted(self.folder.glob("hosts/*/process.json"))]

    def require_up(self) -> None:
        """NotUp if there is no namespace to enter."""
        if not self.namespace.exists():
            raise NotUp(f"lab {self.name!r} is not up: `lab up` starts it")

    def environment(self) -> dict[str, str]:
        """Environment in which SSH and Ansible reach the hosts from inside the namespace.

        Labs on one machine use the same addresses, so each has its own SSH control sockets and its own molecule state.
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
        """SSH command line for a command, or a shell, on a host."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "10",  # a host without power must not hold a command for minutes
            "ControlMaster": "auto",  # Ansible's connections, too: most of a command's price is its handshake
            "ControlPersist": "10m",
            "ControlPath": f"{self.sockets}/%h-%r",
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
        }
        words = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        where = f"root@{machine.host.address}"
        return self.namespace.command(
            "ssh", "-F", "none", "-i", str(self.developer_key), *words, where, *command
        )

    def settle(self, machine: Machine) -> None:
        """Have a running host flush its disks."""
        command = self.ssh(machine, "sync")
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            name = machine.host.name
            raise LabError(
                f"{name} could not sync: {error}; `lab power-off {name}` first takes it as it is"
            ) from None

    def restore_all(self, name: str, steps: Steps) -> None:
        """Restore a snapshot of every host and power it on."""
        for machine in self.machines:
            machine.require_snapshot(name)
        with steps.step(f"put back snapshot {name}"):
            for machine in self.machines:
                self.power_off(machine)
                machine.restore(name)
                machine.power_on()
            for machine in self.machines:
                machine.wait_for_ssh()

    def power_off(self, machine: Machine) -> None:
        """Cut a host's power. What waits for a command on it is told at once."""
        machine.power_off()
        self.forget_connections(machine.host.address)

    def cut(self, machine: Machine) -> None:
        """Unplug a host's network cable. A running command goes on if it is plugged in soon; a new one gets no connection."""
        machine.cut()
        self.forget_connections(machine.host.address, "stop")

    def forget_connections(self, address: str, how: str = "exit") -> None:
        """Close the persistent connections to a host; "stop" leaves them to the commands that they have."""
        for path in self.sockets.glob(f"{address}-*"):
            command = ["ssh", "-F", "none", "-o", f"ControlPath={path}", "-O", how, address]
            subprocess.run(command, check=False, capture_output=True, timeout=10)
            path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """State of the lab as data; status.schema.json describes it."""
        exists = self.namespace.exists()
        hosts = {}
        for machine in self.machines:
            running = machine.running()
            hosts[machine.host.name] = {
                "kind": machine.kind,
                "address": machine.host.address,
                "groups": sorted(machine.host.groups - {"all"}),
                "memory": machine.host.memory,
                "power": running,
                "cable": exists and machine.cable(),
                "ssh": machine.answers(),
                "stick": machine.has_stick(),
                "snapshots": machine.snapshot_names(),
                "disk_bytes": machine.disk_bytes() if machine.exists() else 0,
            }
        return {
            "instance": self.name,
            "namespace": self.namespace.name if exists else None,
            "up": self.is_up(),
            "sink": self.sink.pid() is not None,
            "open": self.forwarder.pid() is not None,
            "hosts": hosts,
            "machine": capabilities(self.folder),
        }


def _both_halves(key: Path) -> list[Path]:
    return [key, key.with_suffix(".pub")]


def _copy_files(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy2(file, folder)


def plug(machine: Machine, source: Path) -> None:
    """Plug `source` (a folder or an ext4 image) into a host as a medium."""
    if not source.exists():
        raise LabError(f"there is nothing to plug at {source}: name a folder or a disk image")
    machine.plug(source)
