"""A machine with real firmware, emulated without KVM: OVMF with Microsoft's keys, a TPM, Debian's shim, GRUB and kernels.

Its serial port is the console at which a person sits; commands go to QEMU's guest agent.
"""

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import listens, until

from lab import archives

PROGRAMS = ("qemu-system-x86_64", "swtpm", "mcopy", "mkfs.vfat", "pahole", "mmdebstrap", "sfdisk")
OVMF = Path("/usr/share/OVMF")
SYSTEM = (
    "grub-efi-amd64,grub-efi-amd64-signed,initramfs-tools,kmod,mokutil,python3-minimal,qemu-guest-agent,shim-signed,"
    "systemd-sysv,udev,zstd"
)
ROOT_UUID = "6c6c6b65-6570-4000-8000-000000000001"
ESP_MIB, ROOT_MIB = 64, 1024
BOOT = 900  # seconds; a boot takes two minutes on a busy machine, and five on a very busy one
DOWN, ENTER = "\x1b[B", "\r"


def said(*argv: object) -> str:
    """Output of a program on this machine; AssertionError with its words if it fails."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv[0]} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def make_disk(folder: Path, kernels: tuple[str, str]) -> None:
    """Debian 13 with these kernels, as FOLDER/disk.img, whose shim is where `grub-install --removable` puts it.

    Needs root, and neither loop devices nor device-mapper: both file systems are made in files.
    """
    tree, esp, root, disk = folder / "tree", folder / "esp.img", folder / "root.img", folder / "disk.img"
    sources = folder / "debian.sources"
    sources.write_text(archives.machine_sources())
    images = ",".join(f"linux-image-{kernel}" for kernel in kernels)
    options = ["--quiet", "--variant=minbase", f"--include={SYSTEM},{images}"]
    options += [
        f"--aptopt={option}" for option in ('APT::Install-Recommends "false"', *archives.acquire_options())
    ]
    said("mmdebstrap", *options, "--dpkgopt=path-exclude=/usr/share/doc/*", "trixie", tree, sources)
    (tree / "etc/default/grub.d").mkdir(exist_ok=True)
    grub = 'GRUB_TERMINAL=console\nGRUB_TIMEOUT=1\nGRUB_CMDLINE_LINUX="console=ttyS0"\n'
    (tree / "etc/default/grub.d/serial.cfg").write_text(grub)
    # What an installer does by update-grub; here the machine itself does, once it runs.
    files = f"linux /boot/vmlinuz-{kernels[0]} root=UUID={ROOT_UUID} ro console=ttyS0\ninitrd /boot/initrd.img-{kernels[0]}\n"
    (tree / "boot/grub/grub.cfg").write_text(f"{files}boot\n")
    (tree / "etc/systemd/system/default.target").symlink_to("/usr/lib/systemd/system/basic.target")
    find = folder / "find.cfg"
    find.write_text(
        f"search.fs_uuid {ROOT_UUID} root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
    )
    shim = tree / "usr/lib/shim"
    said("mkfs.vfat", "-C", "-F", "32", esp, ESP_MIB << 10)
    said("mmd", "-i", esp, "::EFI", "::EFI/BOOT", "::EFI/debian")
    for source, target in {
        shim / "shimx64.efi.signed": "BOOT/BOOTX64.EFI",
        shim / "mmx64.efi.signed": "BOOT/mmx64.efi",
        tree / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed": "BOOT/grubx64.efi",
        find: "debian/grub.cfg",
    }.items():
        said("mcopy", "-i", esp, source, f"::EFI/{target}")
    said("mke2fs", "-q", "-t", "ext4", "-U", ROOT_UUID, "-d", tree, root, f"{ROOT_MIB}M")
    with disk.open("wb") as file:
        file.truncate((ESP_MIB + ROOT_MIB + 2) << 20)
    table = f"label: gpt\nstart=1MiB,size={ESP_MIB}MiB,type=uefi\nstart={ESP_MIB + 1}MiB,size={ROOT_MIB}MiB,type=linux\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=table.encode(), check=True)
    for image, start in ((esp, 1), (root, ESP_MIB + 1)):
        said(
            "dd", f"if={image}", f"of={disk}", "bs=1M", f"seek={start}", "conv=notrunc,sparse", "status=none"
        )
        image.unlink()
    shutil.rmtree(tree)


class Dialogue:
    """JSON by line on a UNIX socket: QEMU's monitor, or the guest agent."""

    def __init__(self, path: Path, seconds: float = BOOT) -> None:
        self.channel = socket.socket(socket.AF_UNIX)
        self.channel.settimeout(seconds)
        self.channel.connect(str(path))
        self.lines = self.channel.makefile("rb")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What a command returns. RuntimeError if it fails, TimeoutError if nothing comes."""
        self.channel.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            if "return" in answer:  # QEMU also tells events
                return answer["return"]
        raise RuntimeError(f"{command}: the machine is gone")

    def close(self) -> None:
        self.lines.close()
        self.channel.close()


class Machine:
    """A machine that runs, with its console."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = 0  # bytes of the console
        self.monitor = Dialogue(folder / "monitor")
        self.monitor.ask("qmp_capabilities")
        self.agent: Dialogue | None = None

    def shown(self) -> bytes:
        """What the console showed, from its start."""
        return (self.folder / "console").read_bytes()

    def sees(self, *texts: str) -> None:
        """Wait until the console shows these texts, one after the other, after those seen before."""
        for text in texts:
            until(lambda text=text: text.encode() in self.shown()[self.seen :], BOOT)  # type: ignore[misc]
            self.seen = self.shown().index(text.encode(), self.seen) + len(text)

    def types(self, *keys: str) -> None:
        """Keys of a person, who looks at the screen in between: firmware drops keys while it draws."""
        for key in keys:
            time.sleep(2)
            (self.folder / "keys").write_text(key)

    def boots(self) -> str:
        """Wait for a system that answers; the release of its kernel."""
        end = time.monotonic() + BOOT
        while True:
            agent = Dialogue(self.folder / "agent", 15)
            try:
                # What an agent says to someone before this is left out.
                number = secrets.randbits(31)
                answer = agent.ask("guest-sync", id=number)
                while answer != number:
                    answer = json.loads(agent.lines.readline())["return"]
                break
            except (TimeoutError, ValueError, RuntimeError):
                agent.close()
                assert time.monotonic() < end, self.shown()[-2000:].decode(errors="replace")
        agent.channel.settimeout(BOOT)
        self.agent = agent
        return self.on("uname -r").strip()

    def on(self, command: str, given: bytes = b"", check: bool = True) -> str:
        """Output of a shell command there, both streams."""
        assert self.agent
        script = f"exec 2>&1; export PATH=/usr/sbin:/usr/bin; {command}"
        options = {"capture-output": True, "input-data": base64.b64encode(given).decode()}
        process = self.agent.ask("guest-exec", path="/bin/sh", arg=["-c", script], **options)
        while not (done := self.agent.ask("guest-exec-status", **process))["exited"]:
            time.sleep(0.3)
        told = base64.b64decode(done.get("out-data", "")).decode(errors="replace")
        assert not check or done["exitcode"] == 0, f"{command} ended with {done['exitcode']}: {told}"
        return told

    def reset(self) -> None:
        """What its button does. What was written is on the disk."""
        self.on("sync")
        assert self.agent
        self.agent.close()
        self.monitor.ask("system_reset")


@contextlib.contextmanager
def powered_on(folder: Path) -> Iterator[Machine]:
    """The machine whose disk is in the folder, with new firmware and TPM, until it is switched off."""
    shutil.copy(OVMF / "OVMF_VARS_4M.ms.fd", folder / "variables.fd")
    (folder / "tpm").mkdir()
    tpm = [
        "swtpm",
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={folder}/tpm",
        "--ctrl",
        f"type=unixio,path={folder}/tpm.sock",
    ]
    # A socket would lose what firmware draws while its reader is slow.
    console = f"file,id=console,path={folder}/console,input-path={folder}/keys"
    os.mkfifo(folder / "keys")
    # QEMU waits for a writer of the keys, and stops reading after the last one.
    keys = os.open(folder / "keys", os.O_RDWR)
    qemu = (
        "qemu-system-x86_64 -accel tcg -machine q35,smm=on -cpu max -smp 1 -m 1024 -nodefaults -display none"
        " -global driver=cfi.pflash01,property=secure,value=on"
        f" -drive if=pflash,format=raw,unit=0,readonly=on,file={OVMF}/OVMF_CODE_4M.ms.fd"
        f" -drive if=pflash,format=raw,unit=1,file={folder}/variables.fd"
        f" -drive if=virtio,format=raw,file={folder}/disk.img"
        f" -chardev socket,id=tpm,path={folder}/tpm.sock -tpmdev emulator,id=tpm,chardev=tpm -device tpm-crb,tpmdev=tpm"
        f" -chardev {console} -serial chardev:console -device virtio-rng-pci"
        f" -device virtio-serial -chardev socket,id=agent,path={folder}/agent,server=on,wait=off"
        " -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
        f" -qmp unix:{folder}/monitor,server=on,wait=off"
    )
    processes = []
    try:
        processes.append(subprocess.Popen(tpm))
        until(lambda: listens(folder / "tpm.sock"))
        processes.append(subprocess.Popen(qemu.split()))
        until(lambda: all(listens(folder / name) for name in ("agent", "monitor")), 60)
        yield Machine(folder)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
        os.close(keys)
