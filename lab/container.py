"""A host in a container: a whole Debian with its own systemd on this machine's kernel, run by systemd-nspawn.

Its root is an overlay: the bare Debian, the layers of snapshots above it, and on top a folder for the changes since then.
"""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import image
from lab.cgroup import Group
from lab.errors import LabError
from lab.files import copy
from lab.machine import Machine
from lab.network import BRIDGE, mac

STICK = "/run/lab/stick"
# What a host does to a kernel that is not its own: its clock is followed and not set, and of two of its settings, which the
# roles write, it has copies.
FILES = {
    "/etc/systemd/system/chrony.service.d/lab.conf": (
        "[Unit]\nConditionCapability=\n[Service]\nExecStart=\nExecStart=!/usr/sbin/chronyd -F 1 -x\n",
        0o644,
    ),
    "/etc/systemd/system/lab-sysctl.service": (
        """[Unit]
Description=Copies of the kernel's settings that this container may write
DefaultDependencies=no
Before=systemd-sysctl.service sysinit.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/lab/sysctl
""",
        0o644,
    ),
    "/usr/lib/lab/sysctl": (
        """#!/bin/sh
set -e
mkdir -p /run/lab/sysctl
for name in kernel/core_pattern fs/suid_dumpable; do
    copy=/run/lab/sysctl/${name##*/}
    cat /proc/sys/$name > $copy
    mount --bind $copy /proc/sys/$name
done
""",
        0o755,
    ),
}
LINKS = {"/etc/systemd/system/sysinit.target.wants/lab-sysctl.service": "../lab-sysctl.service"}


class Container(Machine):
    """Boots within seconds and runs at native speed. Its writes survive a power cut, flushed or not."""

    kind = "container"
    stick_source = (STICK, "ro,bind")

    @staticmethod
    def base(report: image.Report) -> Path:
        return image.base_tree(report)

    @property
    def written(self) -> Path:
        """The overlay's upper directory: changes since the last snapshot or restore."""
        return self.folder / "written"

    @property
    def layers(self) -> Path:
        """Immutable layers of snapshots, one subdirectory each. All labs of a checkout share them."""
        return layers_of(self.folder.parents[2])

    @property
    def chain_file(self) -> Path:
        """File with the list of layers below its root."""
        return self.folder / "chain.json"

    @property
    def stick(self) -> Path:
        """Content of its stick; missing or empty if none is plugged in."""
        return self.folder / "stick"

    @property
    def cable_name(self) -> str:
        return f"ve{self.host.address.rpartition('.')[2]}"

    def exists(self) -> bool:
        return self.chain_file.exists()

    def has_stick(self) -> bool:
        return self.stick.exists() and any(self.stick.iterdir())

    def disk_bytes(self) -> int:
        done = subprocess.run(
            ["du", "--summarize", "--block-size=1", str(self.written)],
            check=False,  # a file may go while it counts
            capture_output=True,
            text=True,
        )
        return int((done.stdout or "0").split()[0])

    def create(self, base: Path, files: dict[str, tuple[bytes, int]]) -> None:
        if self.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.layers, fcntl.LOCK_SH):
            self._lie_on([self._first_layer(files), str(base)])

    def _first_layer(self, files: dict[str, tuple[bytes, int]]) -> str:
        layer = self.layers / uuid.uuid4().hex[:12]
        own = {path: (text.encode(), mode) for path, (text, mode) in FILES.items()}
        for path, (content, mode) in (files | own).items():
            file = layer / path.removeprefix("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(mode)
        for path, target in LINKS.items():
            link = layer / path.removeprefix("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
        for private in ("root", "root/.ssh"):
            (layer / private).chmod(0o700)
        return layer.name

    def chain(self) -> list[str]:
        """Layers below its root, topmost first: names of snapshot layers, then the path of the bare Debian."""
        chain: list[str] = json.loads(self.chain_file.read_text(encoding="utf-8"))
        return chain

    def _lie_on(self, chain: list[str]) -> None:
        staged = self.chain_file.with_suffix(".new")
        staged.write_text(json.dumps(chain), encoding="utf-8")
        staged.replace(self.chain_file)

    def power_on(self) -> None:
        if self.sound():
            return
        self.power_off()
        self.namespace.plug_pair(self.cable_name, self.host.address)
        for scratch in ("work", "cgroup"):
            shutil.rmtree(self.folder / scratch, ignore_errors=True)
        for place in (self.folder / "root", self.folder / "work", self.written, self.stick):
            place.mkdir(exist_ok=True)
        for part in ("supervisor", "host"):
            Group(self.group.path / part).create()
        self.group.limit_memory(self.host.memory)
        spawn = ["systemd-nspawn", "--quiet", "--directory=root", "--boot", "--keep-unit", "--register=no"]
        spawn += [f"--machine={self.namespace.name}-{self.host.name}", f"--hostname={self.host.name}"]
        spawn += ["--private-network", f"--network-interface=c{self.cable_name}:vec0", "--link-journal=no"]
        spawn += ["--console=pipe", "--resolv-conf=off", "--timezone=off", "--settings=no"]
        # This machine's memory survives a container's power cut, so that waiting for its disk would only take time. But a file
        # is not opened with O_SYNC then, which Filebeat has to do after some 60,000 lines, when it shortens its registry.
        if "LAB_SYNC" not in os.environ:
            spawn += ["--suppress-sync=yes"]
        # Without it IPAddressDeny of a unit would be in no effect, and nothing would say so.
        spawn += ["--system-call-filter=bpf"]
        spawn += [f"--bind-ro={self.stick}:{STICK}"]
        supervisor = str(Path(__file__).with_name("container.sh"))
        options = (str(self.group.path), self.overlay(self.chain()), "root")
        cable = (self.cable_name, mac(self.host.address), BRIDGE)
        self.process.start(
            self.namespace.command("unshare", "--mount", "sh", supervisor, *options, *cable, *spawn),
            cwd=self.folder,
            log=self.console,
            environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            pipe_output=True,
        )

    def overlay(self, chain: list[str], written: str = "written", work: str = "work") -> str:
        """Options of `mount` for a root that lies on layers, relative to the host's folder.

        Each layer is an option of its own: the kernel accepts at most 255 bytes per option, which a list of paths soon exceeds.
        `redirect_dir` makes renames of folders atomic, as on a disk.
        """
        layers = os.path.relpath(self.layers, self.folder)
        places = [f"{layers}/{part}" if "/" not in part else part for part in chain]
        if missing := [layer for layer in places if not (self.folder / layer).is_dir()]:
            raise LabError(
                f"{self.host.name} lies on {missing[0]}, which is gone: `lab destroy`, then `lab up`"
            )
        lower = [f"lowerdir+={layer}" for layer in places]
        return ",".join(["redirect_dir=on", *lower, f"upperdir={written}", f"workdir={work}"])

    @contextmanager
    def tree(self, name: str) -> Iterator[Path]:
        """The root of a snapshot without what only a container needs. What is written there does not stay."""
        chain = json.loads((self.require_snapshot(name) / "chain.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            root, written, work = (Path(scratch, part) for part in ("root", "written", "work"))
            for place in (root, written, work):
                place.mkdir()
            options = self.overlay(chain, *(str(place.relative_to(self.folder)) for place in (written, work)))
            mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(root)]
            subprocess.run(mount, cwd=self.folder, check=True)
            try:
                for path in (*FILES, *LINKS):
                    (root / path.removeprefix("/")).unlink()
                yield root
            finally:
                subprocess.run(["umount", root], check=True)

    def power_off(self) -> None:
        self.group.kill()
        self.process.kill()
        self.group.remove()

    def plug(self, source: Path) -> None:
        """The host has the folder mounted, so its content is replaced and the folder itself is kept."""
        if not source.is_dir():
            raise LabError(f"{source} is no folder: a container's medium is one, a disk image needs a kernel")
        self.stick.mkdir(exist_ok=True)
        for old in self.stick.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        copy(source, self.stick, "--archive", "--no-target-directory")

    def snapshot(self, name: str) -> None:
        self.written.mkdir(exist_ok=True)
        with locked(self.layers, fcntl.LOCK_SH):
            layer = self.layers / uuid.uuid4().hex[:12]
            chain = [layer.name, *self.chain()]
            if not self.running():
                self.written.rename(layer)  # without power it can as well lie on them
                self._lie_on(chain)
            else:
                self.group.freeze()
                try:
                    copy(self.written, layer, "--archive")
                finally:
                    self.group.thaw()
            self._keep(name, chain)
        forget_layers(self.folder.parents[2])

    def _keep(self, name: str, chain: list[str]) -> None:
        """A snapshot is the list of layers below the root."""
        staged = self.snapshots / f"{name}.new"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        (staged / "chain.json").write_text(json.dumps(chain), encoding="utf-8")
        target = self.snapshots / name
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)

    def restore(self, name: str) -> None:
        chain = json.loads((self.require_snapshot(name) / "chain.json").read_text(encoding="utf-8"))
        old = self.folder / "written.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.written.exists():
            self.written.rename(old)
        self._lie_on(chain)
        shutil.rmtree(old, ignore_errors=True)
        forget_layers(self.folder.parents[2])

    def take_over(self, other: Machine, name: str) -> None:
        with locked(self.layers, fcntl.LOCK_SH):
            chain = (other.require_snapshot(name) / "chain.json").read_text(encoding="utf-8")
            self._keep(name, json.loads(chain))


def layers_of(instances: Path) -> Path:
    """The folder of layers that the labs below INSTANCES share."""
    return instances.with_name("layers")


@contextmanager
def locked(layers: Path, how: int) -> Iterator[None]:
    """Shared by labs that make layers, which no chain names yet, or chains; exclusive while layers are deleted."""
    layers.mkdir(parents=True, exist_ok=True)
    with layers.with_suffix(".lock").open("w") as handle:
        fcntl.flock(handle, how)
        yield


def forget_layers(instances: Path) -> None:
    """Delete layers that no snapshot of these labs and no root of their hosts refers to."""
    layers = layers_of(instances)
    with locked(layers, fcntl.LOCK_EX):
        chains = [
            *instances.glob("*/hosts/*/chain.json"),
            *instances.glob("*/hosts/*/snapshots/*/chain.json"),
        ]
        used = {part for chain in chains for part in json.loads(chain.read_text(encoding="utf-8"))}
        for layer in layers.iterdir():
            if layer.name not in used:
                shutil.rmtree(layer)
