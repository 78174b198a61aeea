"""The rule of never formatting, on hostile disks: image files and loop devices with what real tools make.

Left to lab hosts (tests/lab/kernels/test_storage.py), since they need device-mapper in the kernel: unreadable blocks by dm-dust
(here a disk that ends early and a read that fails stand in), and a holder. A member of a running array is left there too.
"""

import errno
import hashlib
import itertools
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plugin_modules import load

disks, volume, volume_phases = map(
    load, ("module_utils.volumes.disks", "module_utils.volumes.volume", "module_utils.volumes.phases")
)
MIB = 1 << 20
SIZE = 48 * MIB
Maker = Callable[[Path], None]


def tool(*argv: str | Path, given: str | None = None) -> None:
    subprocess.run([str(word) for word in argv], input=given, text=True, check=True, capture_output=True)


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def image(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as stream:
        stream.truncate(size)
    return path


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refused(path: Path, serial: str, size: int, state: Path, destroy: str = "") -> str:
    """What luks_volume says of a disk that it was told to format and must not: not one byte of it changes."""
    before = digest(path)
    wanted = volume.Volume(
        "data", serial, size, {}, state / "pin", "", state, device=str(path), destroy=destroy
    )
    with pytest.raises(volume.Refused) as told, wanted.alone():
        volume_phases.converge(wanted)
    assert digest(path) == before
    assert not (state / "data.json").exists(), "an intent to format it"
    return str(told.value)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A loop device over an empty image."""
    backing = image(tmp_path / "LOOP-1")
    done = subprocess.run(
        ["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop devices on this machine: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    yield device
    tool("losetup", "--detach", device)


# ---------------------------------------------------------------- the disks
def luks(kind: str) -> Maker:
    def make(path: Path) -> None:
        tool("cryptsetup", "luksFormat", "--batch-mode", "--type", kind, "--pbkdf", "pbkdf2",
             "--pbkdf-force-iterations", "1000", path, "-", given="secret")  # fmt: skip

    return make


def sized(size: int, *argv: str) -> Maker:
    """These file systems want more room than SIZE."""

    def make(path: Path) -> None:
        os.truncate(path, size)
        tool(*argv, path)

    return make


def lvm_member(path: Path) -> None:
    """A label as pvcreate writes it; pvcreate itself takes no image file."""

    def crc(content: bytes) -> int:
        return zlib.crc32(content, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    body = (
        struct.pack("<I8s", 32, b"LVM2 001") + b"0123456789abcdefghijklmnopqrstuv" + struct.pack("<Q", SIZE)
    )
    body = body.ljust(512 - 20, b"\0")
    patch(path, 512, b"LABELONE" + struct.pack("<QI", 1, crc(body)) + body)


def md_member(path: Path) -> None:
    """A superblock of md, version 1.2."""
    block = bytearray(256)
    struct.pack_into("<II", block, 0, 0xA92B4EFC, 1)
    block[16:32] = b"0123456789abcdef"  # the array's UUID
    struct.pack_into("<QQ", block, 128, 2048, SIZE // 512 - 2048)  # where the data is
    struct.pack_into("<Q", block, 144, 8)  # where this block is, in sectors
    total = sum(struct.unpack("<64I", block))
    struct.pack_into("<I", block, 216, (total & 0xFFFFFFFF) + (total >> 32))
    patch(path, 4096, bytes(block))


def zfs_label(path: Path) -> None:
    """The first label's list of names and values; smaller disks are none for ZFS."""

    def pair(name: bytes, kind: int, value: bytes) -> bytes:
        body = (
            struct.pack(">II", 0, len(name))
            + name
            + bytes(-len(name) % 4)
            + struct.pack(">II", kind, 1)
            + value
        )
        return struct.pack(">I", len(body) + 4) + body

    os.truncate(path, 64 * MIB)
    pairs = [pair(name, 8, struct.pack(">Q", 7)) for name in (b"guid", b"txg", b"pool_guid")]
    pairs.append(pair(b"state", 8, bytes(8)))
    patch(path, 16 << 10, b"\x01\x01" + bytes(10) + b"".join(pairs))


def bitlocker(path: Path) -> None:
    sector = bytearray(512)
    sector[0:11] = b"\xeb\x58\x90-FVE-FS-"
    sector[160:176] = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")
    struct.pack_into("<Q", sector, 176, 1 << 16)
    sector[510:512] = b"\x55\xaa"
    patch(path, 0, bytes(sector))
    patch(path, 1 << 16, b"-FVE-FS-" + struct.pack("<HH", 64, 2) + bytes(52) + struct.pack("<II", 48, 1))


def primary_header_lost(path: Path) -> None:
    luks("luks2")(path)
    patch(path, 0, bytes(16384))


def both_headers_lost(path: Path) -> None:
    luks("luks2")(path)
    patch(path, 0, bytes(32768))
    done = subprocess.run(["blkid", "--probe", path], capture_output=True, check=False)
    assert done.returncode == 2, "this disk has to look blank to blkid, or the test is none"


def partly_zero(path: Path) -> None:
    patch(path, 31 * MIB + 77, b"a file that somebody wants")


HOSTILE: dict[str, tuple[Maker, str]] = {
    "ext4": (lambda path: tool("mkfs.ext4", "-q", "-F", path), r"\(ext4\)"),
    "xfs": (sized(320 * MIB, "mkfs.xfs", "-q"), r"\(xfs\)"),
    "btrfs": (sized(120 * MIB, "mkfs.btrfs", "-q"), r"\(btrfs\)"),
    "lvm": (lvm_member, r"LVM member \(LVM2_member\)"),
    "md": (md_member, r"RAID member \(linux_raid_member\)"),
    "zfs": (zfs_label, r"ZFS member \(zfs_member\)"),
    "gpt": (lambda path: tool("sfdisk", "-q", path, given="label: gpt\n,4M\n"), r"partition table \(gpt\)"),
    "mbr": (lambda path: tool("sfdisk", "-q", path, given="label: dos\n,4M\n"), r"partition table \(dos\)"),
    "luks1": (luks("luks1"), r"LUKS volume \(crypto_LUKS\)"),
    "luks2": (luks("luks2"), r"LUKS volume \(crypto_LUKS\)"),
    "primary header lost": (primary_header_lost, r"LUKS volume \(crypto_LUKS\)"),
    "both headers lost": (both_headers_lost, r"zero: .*byte \d+ is not zero.*whose headers are lost"),
    "swap": (lambda path: tool("mkswap", path), r"swap area \(swap\)"),
    "iso": (
        lambda path: patch(path, 0x8000, b"\x01CD001\x01\x00" + b"LINUX".ljust(32)),
        r"ISO image \(iso9660\)",
    ),
    "bitlocker": (bitlocker, r"BitLocker"),
    "partly zero": (partly_zero, rf"byte {31 * MIB + 77} is not zero"),
    "last byte": (lambda path: patch(path, SIZE - 1, b"\x01"), rf"byte {SIZE - 1} is not zero"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_a_disk_that_holds_something_and_changes_no_byte_of_it(name: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[name]
    path = image(tmp_path / "DISK-1")
    make(path)
    words = refused(path, "DISK-1", SIZE, tmp_path / "state")
    assert re.search(reason, words), words
    assert all(finding.way_out for finding in disks.against_formatting(disks.disk_at(path), "DISK-1", SIZE))


def test_a_blank_disk_has_nothing_against_it(tmp_path: Path, loop: Path) -> None:
    assert disks.against_formatting(disks.disk_at(image(tmp_path / "DISK-1")), "DISK-1", SIZE) == []
    assert disks.against_formatting(disks.disk_at(loop), "LOOP-1", SIZE) == []


def test_refuses_a_wrong_serial_and_two_swapped_disks(tmp_path: Path) -> None:
    one, two = image(tmp_path / "DISK-1"), image(tmp_path / "DISK-2")
    for path, expected in ((one, "DISK-2"), (two, "DISK-1")):
        (finding,) = disks.against_formatting(disks.disk_at(path), expected, SIZE)
        assert finding.test == "serial"
        assert f"{path} has the serial '{path.name}', expected is '{expected}'" in refused(
            path, expected, SIZE, tmp_path / "state"
        )


def test_refuses_a_disk_that_is_too_small(tmp_path: Path) -> None:
    (finding,) = disks.against_formatting(disks.disk_at(image(tmp_path / "DISK-1")), "DISK-1", SIZE + 1)
    assert finding.test == "size"
    words = refused(tmp_path / "DISK-1", "DISK-1", SIZE + 1, tmp_path / "state")
    assert f"has {SIZE} bytes, expected are at least {SIZE + 1}" in words


def test_refuses_a_disk_that_another_process_holds(loop: Path, tmp_path: Path) -> None:
    descriptor = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        words = refused(loop, "LOOP-1", SIZE, tmp_path / "state")
    finally:
        os.close(descriptor)
    assert f"exclusive open: {loop}: Device or resource busy" in words


def test_refuses_a_mounted_disk_also_where_its_destruction_is_allowed(loop: Path, tmp_path: Path) -> None:
    tool("mkfs.ext4", "-q", loop)
    target = tmp_path / "mounted"
    target.mkdir()
    # A mount that may write has a kernel that writes, whenever it wants to.
    done = subprocess.run(["mount", "--read-only", loop, target], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine mounts nothing: {done.stderr.decode()}")
    try:
        found = disks.against_formatting(disks.disk_at(loop), "LOOP-1", SIZE, destroy="LOOP-1")
        assert {finding.test for finding in found} == {"mount", "exclusive open"}
        words = refused(loop, "LOOP-1", SIZE, tmp_path / "state", destroy="LOOP-1")
        assert f"{loop} is mounted on {target}" in words
    finally:
        tool("umount", target)


def test_refuses_an_image_that_a_loop_device_lies_over(loop: Path, tmp_path: Path) -> None:
    words = refused(tmp_path / "LOOP-1", "LOOP-1", SIZE, tmp_path / "state")
    assert f"holder: {loop} lies over {tmp_path / 'LOOP-1'}" in words


def test_an_unreadable_block_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = disks.disk_at(image(tmp_path / "DISK-1"))
    read = os.pread

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        if offset >= 20 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, length, offset)

    monkeypatch.setattr(disks.os, "pread", failing)
    for destroy in ("", "DISK-1"):
        (finding,) = disks.against_formatting(disk, "DISK-1", SIZE, destroy=destroy)
        assert (finding.test, f"byte {20 * MIB}" in finding.observation) == ("read", True)
        assert "Input/output error" in finding.observation


def test_a_disk_that_ends_early_is_a_finding(tmp_path: Path) -> None:
    disk = disks.Disk(image(tmp_path / "DISK-1", 20 * MIB), "DISK-1", SIZE, None)
    assert [finding.test for finding in disks.against_formatting(disk, "DISK-1", SIZE)] == ["read"]


def test_a_probe_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = disks.disk_at(image(tmp_path / "DISK-1"))
    monkeypatch.setattr(
        disks, "probed", lambda argv: subprocess.CompletedProcess(argv, 127, "", "no program")
    )
    found = disks.against_formatting(disk, "DISK-1", SIZE)
    assert [finding.test for finding in found] == ["wipefs", "blkid"]


def test_a_blank_disk_of_a_registered_volume_has_lost_its_header(tmp_path: Path) -> None:
    disk = disks.disk_at(image(tmp_path / "DISK-1"))
    register = disks.from_register([{"uuid": "0dd5", "serial": "DISK-1", "volume": "llm1/data"}])
    (finding,) = disks.against_formatting(disk, "DISK-1", SIZE, register)
    assert finding.test == "register"
    assert "llm1/data" in finding.observation
    assert "restore the backup" in finding.way_out


def test_only_the_serial_of_this_disk_lets_its_contents_go(tmp_path: Path) -> None:
    path = image(tmp_path / "DISK-1")
    HOSTILE["ext4"][0](path)
    disk = disks.disk_at(path)
    assert disks.against_formatting(disk, "DISK-1", SIZE, destroy="DISK-2")
    assert disks.against_formatting(disk, "DISK-1", SIZE, destroy="DISK-1") == []
    assert disks.against_formatting(disk, "DISK-2", SIZE, destroy="DISK-2"), "another disk is in its place"


def test_a_serial_that_no_disk_or_two_have_is_refused(tmp_path: Path) -> None:
    for name, serial in (("sda", "A"), ("sdb", "B"), ("sdc", "B")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "serial").write_text(serial + "\n")
    with pytest.raises(disks.Unusable, match=r"0 disks have the serial 'C'.*'sda': 'A'"):
        disks.disk_of("C", sysfs=tmp_path)
    with pytest.raises(disks.Unusable, match=r"2 disks have the serial 'B'.*name the device"):
        disks.disk_of("B", sysfs=tmp_path)


def test_of_a_large_disk_both_ends_and_a_block_of_each_stripe_are_read() -> None:
    size = 4 << 40
    read = list(disks.pieces(size))
    ends = [(offset, length) for offset, length in read if offset < disks.EDGE or offset >= size - disks.EDGE]
    assert sum(length for _, length in ends) == 2 * disks.EDGE
    assert len(read) - len(ends) == disks.STRIPES
    assert all(offset + length <= size for offset, length in read)
    stripe = (size - 2 * disks.EDGE) // disks.STRIPES
    assert max(after[0] - before[0] for before, after in itertools.pairwise(read)) <= 2 * stripe
