"""What the control node keeps of volumes, the places they are mounted on, and the names of their units."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import HELPERS, load

luks_escrow = load("modules.luks_escrow")
mount_points = load("module_utils.volumes.mount_points")
estate = load("filter.estate")


def given(**other: str) -> dict[str, Any]:
    return {"volume": "llm1/data", "uuid": "u", "serial": "S", "recovery_cms": "", "header_cms": ""} | other


def test_what_is_stored_is_what_is_said_to_be_there(tmp_path: Path) -> None:
    assert luks_escrow.store(tmp_path, given(recovery_cms="r", header_cms="h"), False)
    assert luks_escrow.store(tmp_path, given(recovery_cms="r", header_cms="h"), False) == []
    before = luks_escrow.stored(tmp_path, "llm1/data")
    assert set(before) == {"recovery", "header"}
    (tmp_path / "llm1-data.header.cms").chmod(0o600)
    (tmp_path / "llm1-data.header.cms").write_text("rotten")
    assert luks_escrow.stored(tmp_path, "llm1/data")["header"] != before["header"]
    assert luks_escrow.register(tmp_path) == [{"uuid": "u", "serial": "S", "volume": "llm1/data"}]


def test_the_days_of_storing_and_of_the_last_drill_are_told(tmp_path: Path) -> None:
    luks_escrow.store(tmp_path, given(recovery_cms="r"), False)
    path = tmp_path / "llm1-data.json"
    assert set(luks_escrow.dates(tmp_path, "llm1/data")) == {"recovery_stored"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drilled": "2026-11-25T00:00:00+00:00"}))
    assert luks_escrow.dates(tmp_path, "llm1/data")["drilled"] == "2026-11-25T00:00:00+00:00"


def test_check_mode_stores_nothing(tmp_path: Path) -> None:
    assert luks_escrow.store(tmp_path, given(recovery_cms="r"), True) == [
        "recovery of llm1/data",
        "entry of llm1/data",
    ]
    assert list(tmp_path.iterdir()) == []


def test_no_disk_is_judged_by_a_register_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "llm1-data.json").write_text("{")
    with pytest.raises(luks_escrow.Refused, match=r"llm1-data.json is not an entry.*restore the file"):
        luks_escrow.register(tmp_path)


def test_of_an_erased_volume_only_its_certificate_stays(tmp_path: Path) -> None:
    luks_escrow.store(tmp_path, given(recovery_cms="r", header_cms="h"), False)
    with pytest.raises(luks_escrow.Refused, match="another UUID"):
        luks_escrow.bury(tmp_path, given(uuid="v") | {"certificate": {}}, False)
    assert luks_escrow.bury(tmp_path, given() | {"certificate": {"uuid": "u"}}, False)
    assert luks_escrow.bury(tmp_path, given() | {"certificate": {"uuid": "u"}}, False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["erased"]
    certificate = json.loads((tmp_path / "erased/llm1-data.u.json").read_text())
    assert set(certificate["escrow_destroyed_sha256"]) == {"llm1-data.recovery.cms", "llm1-data.header.cms"}


@pytest.mark.parametrize("volume", ["data", "../x/data", "llm1/../x", "llm1/Data"])
def test_a_name_that_leads_elsewhere_is_refused(volume: str, tmp_path: Path) -> None:
    with pytest.raises(luks_escrow.Refused, match="name, which is HOST/NAME"):
        luks_escrow.store(tmp_path, given(volume=volume), False)


@pytest.mark.parametrize("path", ["/srv/llmkeep", "/var/log/llm-audit", "/a/.b/ü_x:y.z", "/.hidden"])
def test_a_mount_units_name_is_systemds(path: str) -> None:
    done = subprocess.run(
        ["systemd-escape", "--path", "--suffix=mount", path], capture_output=True, text=True, check=True
    )
    assert estate.mount_unit(path) == done.stdout.strip()


@pytest.mark.parametrize("path", ["/", "/a//b", "/a/../b"])
def test_a_path_that_is_none_to_mount_on_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a valid mount point"):
        estate.mount_unit(path)


SETTLE = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from plugin_modules import HELPERS, load
mount_points = load("module_utils.volumes.mount_points")
mount_points.alone()
try:
    print(mount_points.settle(Path(sys.argv[1]), sys.argv[2] == "check"))
except mount_points.Refused as problem:
    print("refused:", problem)
"""


def settled(path: Path, check: str = "") -> str:
    argv = [sys.executable, "-c", SETTLE.format(here=str(HELPERS)), str(path), check]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stdout + done.stderr:
        pytest.skip("this machine gives no mounts or attributes")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_bare_mount_point_is_made_empty_and_immutable_below_its_mount(tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert "made" in settled(place, "check")
    assert not place.exists()
    assert "immutable" in settled(place)
    try:
        with pytest.raises(PermissionError):
            (place / "written").touch()
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
        try:
            (place / "in-the-volume").touch()
            assert settled(place) == "[]"
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        subprocess.run(["chattr", "-i", place], check=True)


def test_what_lies_below_a_mount_is_not_hidden(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "somebodys").touch()
    assert "refused:" in settled(place)
    assert "holds somebodys on the disk below" in settled(place)
