"""Swap under a random key: which disk is marked for it, and that the boot writes to no other."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

luks_swap = load("modules.luks_swap")
luks = load("module_utils.volumes.luks")
SIZE = 24 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "SWAP-1"
    with path.open("wb") as stream:
        stream.truncate(SIZE)
    return path


def settled(disk: Path, check: bool = False, **other: Any) -> dict[str, Any]:
    given = {
        "name": "swap",
        "serial": disk.name,
        "device": str(disk),
        "size": SIZE,
        "registered": [],
        "destroy": "",
    }
    result: dict[str, Any] = luks_swap.settle(
        given | {"state_dir": str(disk.parent / "state")} | other, check
    )
    return result


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_blank_disk_is_marked_by_a_header_that_no_key_opens_and_once(disk: Path) -> None:
    made = settled(disk)
    header = luks.read(disk)
    assert (made["changed"], header.uuid, header.slots) == (True, made["uuid"], {})
    before = digest(disk)
    assert settled(disk) == made | {"changed": False, "changes": []}
    assert digest(disk) == before


def test_a_disk_that_udev_does_not_know_by_its_uuid_is_shown_to_it_again_and_another_is_left_alone(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def answered(argv: list[str], *_given: Any, **_more: Any) -> tuple[int, bytes, str]:
        asked.append(argv)
        return 0, b"", ""

    monkeypatch.setattr(luks, "run", answered)
    (disk.parent / "known").touch()
    luks.show(disk, "known", disk.parent)
    assert asked == []
    luks.show(disk, "missed", disk.parent)
    assert asked == [["udevadm", "trigger", "--action=change", "--settle", str(disk)]]


def test_check_mode_says_what_would_be_done_and_does_nothing(disk: Path) -> None:
    assert settled(disk, check=True)["changes"] == [f"mark {disk} for the swap swap"]
    assert (disk.read_bytes().count(0), (disk.parent / "state").exists()) == (SIZE, False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (["mkfs.ext4", "-q"], "ext4"),
        (["mkswap"], "swap area"),
        (["sh", "-c", 'printf x | dd of="$0" bs=1 seek=20000000 conv=notrunc status=none'], "is not empty"),
    ],
)
def test_a_disk_that_holds_something_is_refused_untouched(disk: Path, make: list[str], reason: str) -> None:
    subprocess.run([*make, str(disk)], check=True, capture_output=True)
    before = digest(disk)
    with pytest.raises(luks_swap.Refused, match=reason):
        settled(disk)
    assert digest(disk) == before
    assert settled(disk, destroy=disk.name)["changed"]
    assert luks.read(disk).slots == {}


def test_a_disk_of_a_volume_another_serial_and_a_small_one_are_refused(disk: Path) -> None:
    known = [{"uuid": "u", "serial": disk.name, "volume": "llm1/data"}]
    for other, reason in (
        ({"registered": known}, "the estate's register has volume llm1/data"),
        ({"serial": "SWAP-2"}, "has the serial 'SWAP-1', expected is 'SWAP-2'"),
        ({"size": SIZE + 1}, "expected are at least"),
    ):
        with pytest.raises(luks_swap.Refused, match=reason):
            settled(disk, **other)
    assert disk.read_bytes().count(0) == SIZE


@pytest.mark.parametrize("step", ["format_device", "must"])
def test_a_run_that_ended_in_the_middle_is_ended_by_the_next(
    disk: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(luks_swap.luks, step, killed)
        with pytest.raises(KeyboardInterrupt):
            settled(disk)
    planned = json.loads((disk.parent / "state/swap.swap.json").read_text())["uuid"]
    assert settled(disk)["uuid"] == planned
    assert luks.read(disk).slots == {}


def test_a_disk_that_got_something_else_since_is_for_a_person_and_is_not_swapped_to(disk: Path) -> None:
    settled(disk)
    subprocess.run(["wipefs", "--all", "--quiet", disk], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    before = digest(disk)
    with pytest.raises(luks_swap.NeedsPerson, match="the mark is gone"):
        settled(disk, destroy=disk.name)
    assert digest(disk) == before
