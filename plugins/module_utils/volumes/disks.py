"""When a disk may be formatted: only if every check ran and none objected.

Unexpected contents never count as blank, and unreadable ones never as empty. Nothing here writes, and all findings about
a disk are reported at once. Only a finding about its contents can be overridden, by naming the disk's serial; findings
about its identity and its use cannot.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
EDGE = 16 * MIB  # a LUKS2 header with its key slots, both copies of a GPT, ZFS labels, md 1.0 superblocks
WHOLE = 512 * MIB  # up to here a disk is read from end to end
STRIPES = 512  # beyond, one block at a random place of each of as many equal stripes
BLOCK = 64 << 10
PROBE_SECONDS = 60
IDENTITY, IN_USE, UNREADABLE, CONTENTS = "identity", "in use", "unreadable", "contents"
# What libblkid calls them, and what people do.
KINDS = {
    "crypto_LUKS": "LUKS volume",
    "LVM2_member": "LVM member",
    "linux_raid_member": "RAID member",
    "zfs_member": "ZFS member",
    "swap": "swap area",
    "iso9660": "ISO image",
    "BitLocker": "BitLocker volume",
    "gpt": "partition table",
    "dos": "partition table",
    "PMBR": "partition table",
}


class Unusable(Exception):
    """The disk is missing or ambiguous; the message says what was searched for and what to do."""


@dataclass(frozen=True)
class Finding:
    """One reason not to format. `about`: identity, use, read errors, or contents."""

    test: str
    observation: str
    way_out: str
    about: str = CONTENTS

    def __str__(self) -> str:
        return f"{self.test}: {self.observation}. {self.way_out}"


@dataclass(frozen=True)
class Disk:
    """A whole disk, a partition, or an image file. `block`: its directory in sysfs, None for a file."""

    path: Path
    serial: str
    size: int  # bytes
    block: Path | None


@dataclass(frozen=True)
class Registered:
    """A volume in the estate's register, which outlives the volume's header."""

    uuid: str
    serial: str
    volume: str  # host/name


# ---------------------------------------------------------------- which disk it is
def serial_in(block: Path) -> str:
    """The serial of a disk in sysfs, '' if it has none; for a loop device, the name of its file."""
    for name in ("serial", "device/serial", "device/vpd_pg80", "loop/backing_file"):
        try:
            content = (block / name).read_bytes()
        except OSError:
            continue
        if name.endswith("pg80"):
            content = content[4:]  # SCSI: a head of four bytes
        text = content.decode("ascii", errors="replace").strip("\0 \n")
        if text:
            return Path(text).name if name.startswith("loop") else text
    return ""


def disk_at(device: Path) -> Disk:
    """The disk behind a path."""
    try:
        real = device.resolve(strict=True)
        mode = real.stat()
    except OSError as problem:
        raise Unusable(
            f"{device} cannot be read ({problem.strerror}): compare with `lsblk --output NAME,SERIAL,SIZE`"
        ) from None
    if stat.S_ISREG(mode.st_mode):
        return Disk(real, real.name, mode.st_size, None)  # an image file's serial is its name
    if not stat.S_ISBLK(mode.st_mode):
        raise Unusable(f"{device} is not a block device or an image file: name the disk")
    block = Path(f"/sys/dev/block/{os.major(mode.st_rdev)}:{os.minor(mode.st_rdev)}").resolve()
    whole = block.parent if (block / "partition").exists() else block
    return Disk(real, serial_in(whole), int((block / "size").read_text()) * 512, block)


def disk_of(serial: str, device: str | None = None, sysfs: Path = Path("/sys/block")) -> Disk:
    """The disk with this serial, or DEVICE if given, regardless of its serial."""
    if device:
        return disk_at(Path(device))
    blocks = [block for block in sorted(sysfs.iterdir()) if serial_in(block) == serial]
    if len(blocks) != 1:
        serials = {block.name: serial_in(block) for block in sorted(sysfs.iterdir()) if serial_in(block)}
        raise Unusable(
            f"{len(blocks)} disks have the serial {serial!r} (seen: {serials}):"
            + (
                " name the device too"
                if blocks
                else " attach it, or correct the volume's serial in the inventory"
            )
        )
    return disk_at(Path("/dev", blocks[0].name.replace("!", "/")))


def identity(disk: Disk, serial: str, size: int) -> Iterator[Finding]:
    """Findings about the disk's identity. SIZE: minimum size in bytes."""
    if disk.serial != serial:
        yield Finding(
            "serial",
            f"{disk.path} has the serial {disk.serial!r}, expected is {serial!r}",
            "Were two disks swapped? Compare with `lsblk --output NAME,SERIAL,SIZE` and correct the inventory",
            IDENTITY,
        )
    if disk.size < size:
        yield Finding(
            "size",
            f"{disk.path} has {disk.size} bytes, expected are at least {size}",
            "Is it another disk, or does it fail? If it is the right one, correct the volume's size in the inventory",
            IDENTITY,
        )


# ---------------------------------------------------------------- who uses it
def users(disk: Disk) -> Iterator[Finding]:
    """Findings about use: holders, mounts, swap, partitions, loop devices over an image file."""
    if disk.block is None:
        for block in sorted(Path("/sys/block").glob("loop*")):
            try:
                backing = (block / "loop/backing_file").read_text().strip()
            except OSError:
                continue
            if backing == str(disk.path):
                yield Finding("holder", f"/dev/{block.name} lies over {disk.path}", "Detach it", IN_USE)
        return
    holders = sorted(path.name for path in (disk.block / "holders").glob("*"))
    if holders:
        yield Finding(
            "holder", f"{disk.path} is held by {', '.join(holders)}", "See `lsblk`; close it", IN_USE
        )
    partitions = sorted(path.parent.name for path in disk.block.glob("*/partition"))
    if partitions:
        yield Finding("partition", f"{disk.path} has {', '.join(partitions)}", "Name another disk", IN_USE)
    number = (disk.block / "dev").read_text().strip()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            yield Finding("mount", f"{disk.path} is mounted on {fields[4]}", "Unmount it", IN_USE)
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        if Path(line.split()[0]).resolve() == disk.path:
            yield Finding("swap", f"{disk.path} is swapped to", f"`swapoff {disk.path}`", IN_USE)


# ---------------------------------------------------------------- what it holds
def probed(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a read-only probe."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(argv, 127, "", f"no program {argv[0]} on this host")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no answer within {PROBE_SECONDS} s")


def signatures(disk: Disk) -> Iterator[Finding]:
    """Findings about signatures that wipefs and blkid recognise. A failed probe is a finding too."""
    way_out = "If it may go, say so by `luks_destroy` with this disk's serial; otherwise name another disk"
    done = probed(["wipefs", "--no-act", "--json", str(disk.path)])
    try:
        entries = json.loads(done.stdout)["signatures"] if done.stdout.strip() else []
    except (ValueError, KeyError, TypeError):
        entries, done.returncode = [], done.returncode or 1
    for entry in entries:
        kind = KINDS.get(entry["type"], "file system or other signature")
        words = f"{kind} ({entry['type']}) at {entry['offset']} of {disk.path}"
        yield Finding("wipefs", words + (f", UUID {entry['uuid']}" if entry.get("uuid") else ""), way_out)
    if done.returncode:
        yield Finding(
            "wipefs",
            f"ended with {done.returncode} on {disk.path}: {done.stderr.strip() or 'no message'}",
            "A disk that cannot be judged is not blank: see `dmesg` and `lsblk`",
        )
    done = probed(["blkid", "--probe", "--output", "export", str(disk.path)])
    fields = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if done.returncode == 0:
        kind = fields.get("TYPE") or fields.get("PTTYPE") or "something"
        words = f"{KINDS.get(kind, 'file system or other signature')} ({kind}) on {disk.path}"
        yield Finding("blkid", words + (f", UUID {fields['UUID']}" if "UUID" in fields else ""), way_out)
    elif done.returncode != 2:  # 2: nothing recognised, or nothing readable; reading() tells the two apart
        words = done.stderr.strip() or "several signatures that contradict each other"
        yield Finding("blkid", f"ended with {done.returncode} on {disk.path}: {words}", way_out)


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the parts to read on a disk of this size: both ends whole, between them one block per stripe."""
    if size <= WHOLE:
        yield from ((offset, min(MIB, size - offset)) for offset in range(0, size, MIB))
        return
    yield from ((offset, MIB) for offset in range(0, EDGE, MIB))
    stripe = (size - 2 * EDGE) // STRIPES
    for number in range(STRIPES):
        offset = EDGE + number * stripe + secrets.randbelow(max(1, stripe - BLOCK))
        yield offset // 4096 * 4096, BLOCK
    last = (size - EDGE) // 4096 * 4096
    yield from ((offset, min(MIB, size - offset)) for offset in range(last, size, MIB))


def reading(disk: Disk, start: int = 0) -> Iterator[Finding]:
    """Findings about contents: open the disk exclusively; every byte read from START on must be zero."""
    try:
        descriptor = os.open(disk.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as problem:
        yield Finding(
            "exclusive open",
            f"{disk.path}: {problem.strerror}",
            "It is in use: see `lsblk` and `fuser`",
            IN_USE,
        )
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # udev and partitioners keep to this lock
        except OSError:
            yield Finding(
                "lock", f"{disk.path} is locked by another process", "Wait for it, run again", IN_USE
            )
            return
        yield from contents(descriptor, disk, start)
    finally:
        os.close(descriptor)


def contents(descriptor: int, disk: Disk, start: int) -> Iterator[Finding]:
    # Blocks that others read before say nothing about the disk: read them again.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for offset, length in pieces(disk.size):
        if offset < start:
            continue
        block = b""
        while len(block) < length:  # a read ends before an unreadable block, and the next one says why
            at = offset + len(block)
            try:
                piece = os.pread(descriptor, length - len(block), at)
            except OSError as problem:
                yield Finding(
                    "read",
                    f"{disk.path} cannot be read at byte {at}: {problem.strerror}",
                    "An unreadable block is not a blank one: replace the disk, or rescue its data first",
                    UNREADABLE,
                )
                return
            if not piece:
                yield Finding(
                    "read",
                    f"{disk.path} ends at byte {at}, not at {disk.size}",
                    "Is it failing? See `dmesg`",
                    UNREADABLE,
                )
                return
            block += piece
        if block.count(0) != length:
            first = offset + len(block) - len(block.lstrip(b"\0"))
            yield Finding(
                "zero",
                f"{disk.path} is not empty: byte {first} is not zero",
                "It may hold data of a kind that no program here knows, an encrypted volume whose headers are lost"
                " among them (a header backup brings that back: docs/operate/storage.md). If it may go, say so by"
                " `luks_destroy` with this disk's serial",
            )
            return


def registered(disk: Disk, register: Sequence[Registered]) -> Iterator[Finding]:
    """Findings about the register: a disk with a registered volume is never blank."""
    for volume in register:
        if volume.serial and volume.serial == disk.serial:
            yield Finding(
                "register",
                f"the estate's register has volume {volume.volume}, UUID {volume.uuid}, on the disk {disk.serial}",
                "If its header is lost, restore the backup (docs/operate/storage.md). If the volume may go, say so by"
                " `luks_destroy` with this disk's serial",
            )


# ---------------------------------------------------------------- all of it
def against_formatting(
    disk: Disk, serial: str, size: int, register: Sequence[Registered] = (), destroy: str = ""
) -> list[Finding]:
    """All findings against formatting. DESTROY: serial of a disk whose contents may be destroyed."""
    findings = [*identity(disk, serial, size), *users(disk)]
    if not (destroy and destroy == serial == disk.serial):
        findings += [*registered(disk, register), *signatures(disk)]
        findings += reading(disk)
    else:
        findings += [finding for finding in reading(disk) if finding.about != CONTENTS]
    return findings


def from_register(entries: Sequence[Mapping[str, str]]) -> list[Registered]:
    """Parse the register as the control node stores it."""
    return [Registered(entry["uuid"], entry.get("serial", ""), entry.get("volume", "?")) for entry in entries]
