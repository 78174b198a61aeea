"""How a disk is found and judged, step by step: sysfs, what probes say, and which bytes are read."""

import json
from pathlib import Path

import pytest
from plugin_modules import load
from said_by_probes import Probes

disks = load("module_utils.volumes.disks")


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """A disk's folder in sysfs."""
    (tmp_path / "sysfs/device").mkdir(parents=True)
    (tmp_path / "sysfs/loop").mkdir()
    return tmp_path / "sysfs"


def test_a_serial_is_read_where_the_kind_of_disk_has_it(block: Path) -> None:
    assert disks.serial_in(block) == ""
    (block / "loop/backing_file").write_text("/images/LOOP-1\n")
    assert disks.serial_in(block) == "LOOP-1"
    (block / "device/vpd_pg80").write_bytes(b"\0\x80\0\x06SCSI/1 \n")
    assert disks.serial_in(block) == "SCSI/1"
    (block / "device/serial").write_bytes(b" \0XNVME/1X\0\n")
    assert disks.serial_in(block) == "XNVME/1X"
    (block / "serial").write_text(" \n")
    assert disks.serial_in(block) == "XNVME/1X", "an empty one says nothing"
    (block / "serial").write_bytes(b"VIRTIO-\xff\t\n")
    assert disks.serial_in(block) == "VIRTIO-�\t"


def test_a_disk_is_found_by_its_serial_or_named(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disks.disk_of("any", str(image)) == disks.Disk(image, "DISK-1", 24 << 20, None)
    for name, serial in ("cciss!c0d0", "A"), ("sdb", "B"):
        (tmp_path / "block" / name).mkdir(parents=True)
        (tmp_path / "block" / name / "serial").write_text(serial)
    monkeypatch.setattr(disks, "disk_at", lambda path: path)
    assert disks.disk_of("A", sysfs=tmp_path / "block") == Path("/dev/cciss/c0d0")
    assert disks.disk_of("B", sysfs=tmp_path / "block") == Path("/dev/sdb")
    with pytest.raises(disks.Unusable, match=r"0 disks.*: attach it, or correct"):
        disks.disk_of("C", sysfs=tmp_path / "block")


def test_only_a_block_device_or_an_image_is_a_disk(tmp_path: Path) -> None:
    with pytest.raises(disks.Unusable, match=r"none cannot be read \(No such file or directory\)"):
        disks.disk_at(tmp_path / "none")
    for other in tmp_path, Path("/dev/null"):
        with pytest.raises(disks.Unusable, match="not a block device or an image file"):
            disks.disk_at(other)
    (tmp_path / "link").symlink_to(image := tmp_path / "IMAGE")
    image.write_bytes(b"12345")
    assert disks.disk_at(tmp_path / "link") == disks.Disk(image, "IMAGE", 5, None)


def test_a_disk_of_exactly_the_size_and_serial_is_the_one_that_is_meant(image: Path) -> None:
    disk = disks.disk_at(image)
    assert list(disks.identity(disk, "DISK-1", 24 << 20)) == []
    assert [found.about for found in disks.identity(disk, "X", (24 << 20) + 1)] == [disks.IDENTITY] * 2


def test_holders_and_partitions_of_a_disk_are_in_use(block: Path, tmp_path: Path) -> None:
    disk = disks.Disk(tmp_path / "sdx", "S", 1, block)
    (block / "dev").write_text("4242:0\n")
    assert list(disks.users(disk)) == []
    for name in "holders/dm-1", "holders/dm-0", "sdx2", "sdx1":
        (block / name).mkdir(parents=True)
    for name in "sdx1", "sdx2":
        (block / name / "partition").touch()
    holder, partition = disks.users(disk)
    assert (holder.test, holder.about, "dm-0, dm-1" in holder.observation) == ("holder", disks.IN_USE, True)
    assert (partition.test, partition.about, "sdx1, sdx2" in partition.observation) == (
        "partition",
        disks.IN_USE,
        True,
    )


def test_a_mounted_disk_is_known_by_its_number(block: Path, tmp_path: Path) -> None:
    fields = Path("/proc/self/mountinfo").read_text().splitlines()[0].split()
    (block / "dev").write_text(f"{fields[2]}\n")
    found = next(disks.users(disks.Disk(tmp_path / "sdx", "S", 1, block)))
    assert (found.test, found.about) == ("mount", disks.IN_USE)
    assert found.observation == f"{tmp_path}/sdx is mounted on {fields[4]}"


def test_a_probe_gets_no_input_an_environment_of_its_own_and_60_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "x")
    done = disks.probed(["sh", "-c", "env; cat; printf '\\377'; echo wrong >&2; exit 3"])
    assert (done.returncode, done.stderr) == (3, "wrong\n")
    assert "LC_ALL=C.UTF-8" in done.stdout
    assert "PATH=/usr/sbin:/usr/bin:/sbin:/bin\n" in done.stdout
    assert "SECRET" not in done.stdout
    assert done.stdout.endswith("�")
    missing = disks.probed(["no-such-program"])
    assert (missing.returncode, missing.stdout, missing.stderr) == (
        127,
        "",
        "no program no-such-program on this host",
    )
    monkeypatch.setattr(disks, "PROBE_SECONDS", 0.01)
    slow = disks.probed(["sleep", "60"])
    assert (slow.returncode, slow.stdout, slow.stderr) == (124, "", "no answer within 0.01 s")


def seen(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The findings, as test and words."""
    monkeypatch.setattr(disks, "probed", probes)
    found = list(disks.signatures(disks.Disk(Path("/dev/x"), "S", 1, None)))
    assert {each.about for each in found} <= {disks.CONTENTS}
    return [f"{each.test}: {each.observation}" for each in found]


def test_silence_of_both_programs_is_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes()
    assert seen(probes, monkeypatch) == []
    assert probes.asked == [
        ["wipefs", "--no-act", "--json", "/dev/x"],
        ["blkid", "--probe", "--output", "export", "/dev/x"],
    ]
    assert seen(Probes(wipefs=(0, '{"signatures": []}', "")), monkeypatch) == []


def test_each_signature_is_named_with_kind_place_and_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"type": "gpt", "offset": "0x200", "uuid": "u1"},
        {"type": "odd", "offset": "0x0", "uuid": None},
    ]
    assert seen(Probes(wipefs=(0, json.dumps({"signatures": entries}), "")), monkeypatch) == [
        "wipefs: partition table (gpt) at 0x200 of /dev/x, UUID u1",
        "wipefs: file system or other signature (odd) at 0x0 of /dev/x",
    ]
    for said, words in (
        ("TYPE=crypto_LUKS\nPTTYPE=dos\nUUID=a=b\nnothing", "LUKS volume (crypto_LUKS) on /dev/x, UUID a=b"),
        ("PTTYPE=dos\n", "partition table (dos) on /dev/x"),
        ("", "file system or other signature (something) on /dev/x"),
    ):
        assert seen(Probes(blkid=(0, said, "")), monkeypatch) == [f"blkid: {words}"]


@pytest.mark.parametrize("out", ["{", "[]", "{}", "5"])
def test_output_that_is_none_of_wipefs_is_a_failure(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(Probes(wipefs=(0, out, "")), monkeypatch) == ["wipefs: ended with 1 on /dev/x: no message"]
    assert seen(Probes(wipefs=(7, out, " bad \n")), monkeypatch) == ["wipefs: ended with 7 on /dev/x: bad"]


def test_a_program_that_fails_says_that_the_disk_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(Probes((1, "", ""), (8, "", "")), monkeypatch) == [
        "wipefs: ended with 1 on /dev/x: no message",
        "blkid: ended with 8 on /dev/x: several signatures that contradict each other",
    ]
    assert seen(Probes(blkid=(1, "", " why\n")), monkeypatch) == ["blkid: ended with 1 on /dev/x: why"]


def test_a_disk_of_up_to_512_mib_is_read_whole() -> None:
    for size in (1, disks.MIB, disks.MIB + 1, disks.WHOLE):
        read = list(disks.pieces(size))
        assert [offset for offset, _ in read] == list(range(0, size, disks.MIB))
        assert sum(length for _, length in read) == size


def test_a_larger_one_in_blocks_of_4_kib_from_edge_to_edge() -> None:
    size = disks.WHOLE + 4097
    read = list(disks.pieces(size))
    assert read[:2] == [(0, disks.MIB), (disks.MIB, disks.MIB)]
    assert sum(length for offset, length in read if length == disks.MIB) >= disks.EDGE
    assert sum(read[-1]) == size
    assert all(offset % 4096 == 0 for offset, _ in read)
    middle = [each for each in read if each[1] == disks.BLOCK]
    assert len(middle) == disks.STRIPES
    stripe = (size - 2 * disks.EDGE) // disks.STRIPES
    for number, (offset, _) in enumerate(middle):
        start = disks.EDGE + number * stripe
        assert start - 4096 < offset <= start + max(0, stripe - disks.BLOCK)


def test_the_first_byte_that_is_not_zero_is_named_from_the_start_on(image: Path) -> None:
    disk = disks.disk_at(image)
    assert list(disks.reading(disk)) == []
    with image.open("r+b") as stream:
        stream.seek((5 << 20) + 7)
        stream.write(b"\1\2")
    (found,) = disks.reading(disk)
    assert (found.test, found.about, f"byte {(5 << 20) + 7} is not zero" in found.observation) == (
        "zero",
        disks.CONTENTS,
        True,
    )
    assert len(list(disks.reading(disk, start=5 << 20))) == 1
    assert list(disks.reading(disk, start=6 << 20)) == []


def test_a_locked_and_a_missing_disk_are_in_use(image: Path, tmp_path: Path) -> None:
    disk = disks.disk_at(image)
    with image.open() as held:
        disks.fcntl.flock(held, disks.fcntl.LOCK_EX)
        (found,) = disks.reading(disk)
    assert (found.test, found.about) == ("lock", disks.IN_USE)
    assert list(disks.reading(disk)) == [], "the lock is not kept"
    (found,) = disks.reading(disks.Disk(tmp_path / "none", "S", 1, None))
    assert (found.test, found.about) == ("exclusive open", disks.IN_USE)
    assert "No such file" in found.observation


def test_an_early_end_and_an_unreadable_block_are_unreadable(image: Path) -> None:
    (found,) = disks.reading(disks.Disk(image, "S", (24 << 20) + 1, None))
    assert (found.test, found.about) == ("read", disks.UNREADABLE)
    assert f"ends at byte {24 << 20}, not at {(24 << 20) + 1}" in found.observation


def test_a_disk_of_the_register_is_never_blank_and_one_without_a_serial_is_in_none(image: Path) -> None:
    register = disks.from_register([{"uuid": "u1"}, {"uuid": "u2", "serial": "DISK-1", "volume": "h/v"}])
    assert register == [disks.Registered("u1", "", "?"), disks.Registered("u2", "DISK-1", "h/v")]
    disk = disks.disk_at(image)
    assert [found.test for found in disks.registered(disk, register)] == ["register"]
    assert list(disks.registered(disks.Disk(image, "", 1, None), register)) == []
