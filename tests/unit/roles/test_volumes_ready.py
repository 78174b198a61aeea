"""`llmkeep-volumes`: what asks the HSM before systemd-cryptsetup does, and what an auditor asks; llmkeep-hsm is a stand-in."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from plugin_modules import load

PROGRAM = Path(__file__).resolve().parents[3] / "roles/luks/files/llmkeep_volumes.py"


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("llmkeep_volumes", str(PROGRAM))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    (tmp_path / "pin").write_text("sealed once")
    (tmp_path / "data.json").write_text(json.dumps({"uuid": "u"}))
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/cryptsetup.pkcs11-pin").write_text("1234")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    module.SETTINGS.update({"volumes": [], "swap": [], "pin": str(tmp_path / "pin"), "state": str(tmp_path)})
    return module


def program(path: Path, script: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho asked >> {path}.calls\n{script}\n")
    path.chmod(0o755)
    return str(path)


def calls(path: Path) -> int:
    record = Path(f"{path}.calls")
    return len(record.read_text().splitlines()) if record.exists() else 0


def hsm(volumes: ModuleType, tmp_path: Path, code: int) -> Path:
    path = tmp_path / "hsm"
    volumes.HSM = program(path, f"echo said; exit {code}")  # type: ignore[attr-defined]
    return path


def test_an_hsm_that_answers_lets_the_volume_be_opened(volumes: ModuleType, tmp_path: Path) -> None:
    hsm(volumes, tmp_path, 0)
    assert volumes.ready("data") == 0


@pytest.mark.parametrize("code", [10, 11, 15, 16, 21])
def test_where_the_hsm_is_away_or_no_login_is_due_nothing_is_tried(
    code: int, volumes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tmp_path / "bin/cryptsetup"
    program(tried, "exit 0")
    monkeypatch.setenv("PATH", f"{tried.parent}:/usr/bin:/bin")
    path = hsm(volumes, tmp_path, code)
    assert [volumes.ready("data"), volumes.ready("data")] == [code, code]
    assert (calls(path), calls(tried)) == (2, 0)


@pytest.mark.parametrize(("says", "opens"), [("exit 0", 0), ("exit 1", 17)])
def test_where_one_key_is_gone_the_other_one_may_open(
    says: str, opens: int, volumes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tmp_path / "bin/cryptsetup"
    program(tried, f"cat > {tmp_path}/given; {says}")
    monkeypatch.setenv("PATH", f"{tried.parent}:/usr/bin:/bin")
    hsm(volumes, tmp_path, 17)
    assert volumes.ready("data") == opens
    assert (tmp_path / "given").read_text() == "1234"


def test_a_pin_that_the_other_token_refuses_is_remembered_too(
    volumes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tmp_path / "bin/cryptsetup"
    program(tried, "echo 'PIN for token spare is incorrect, please try again.' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tried.parent}:/usr/bin:/bin")
    path = tmp_path / "hsm"
    volumes.HSM = program(path, f'if [ "$1" = refused ]; then touch {path}.noted; exit 0; fi; exit 17')  # type: ignore[attr-defined]
    assert volumes.ready("data") == 17
    assert (Path(f"{path}.noted").exists(), calls(tried)) == (True, 1)


# ---------------------------------------------------------------- the drill
def day(ago: int) -> str:
    return (datetime.now(UTC) - timedelta(days=ago)).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    ("made", "drilled", "holds", "words"),
    [
        (10, None, True, "no drill yet; a drill is due"),
        (31, None, False, "no drill yet; a drill is due"),
        (900, 399, True, "the next one is due"),
        (900, 401, False, "the next one is due"),
        (29, 30, True, "before that; a drill is due"),  # the recovery key was rotated since
        (31, 300, False, "before that; a drill is due"),
    ],
)
def test_a_drill_that_is_old_missing_or_of_an_earlier_recovery_key_is_told_once_it_is_due(
    made: int, drilled: int | None, holds: bool, words: str, volumes: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(
        json.dumps(
            {
                "slots": {
                    "1": {"owner": "hsm", "enrolled": day(0)},
                    "3": {"owner": "recovery", "enrolled": day(made)},
                }
            }
        )
    )
    kept = {"drilled": day(drilled)} if drilled is not None else {}
    volumes.SETTINGS.update({"drill_days": 400, "drill_grace_days": 30, "escrow": {"data": kept}})
    ((ok, told),) = volumes.drill({"name": "data"})
    assert ok is holds
    assert words in told


def test_what_the_control_node_keeps_of_another_time_is_told(volumes: ModuleType, tmp_path: Path) -> None:
    known = {"phase": "done", "recovery_sha256": "r", "header_sha256": "h"}
    (tmp_path / "data.json").write_text(json.dumps(known))
    for kept, wrong in (
        ({"recovery": "r", "header": "h"}, 0),
        ({"recovery": "r", "header": "x"}, 1),
        ({}, 2),
    ):
        volumes.SETTINGS["escrow"] = {"data": kept}
        assert [ok for ok, _ in volumes.escrow({"name": "data"})].count(False) == wrong


# ---------------------------------------------------------------- swap
def test_a_boot_writes_swap_to_the_marked_disk_only(
    volumes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks, swap = load("module_utils.volumes.disks"), load("modules.luks_swap")
    monkeypatch.setitem(sys.modules, "disks", disks)
    disk = tmp_path / "SWAP-1"
    with disk.open("wb") as stream:
        stream.truncate(24 << 20)
    given = {
        "name": "swap",
        "serial": "SWAP-1",
        "device": str(disk),
        "size": 24 << 20,
        "registered": [],
        "destroy": "",
    }
    uuid = swap.settle(given | {"state_dir": str(tmp_path)}, False)["uuid"]
    # As udev links it.
    monkeypatch.setattr(volumes, "BY_UUID", tmp_path)
    (tmp_path / uuid).symlink_to(disk)
    volumes.SETTINGS["swap"] = [{"name": "swap", "serial": "SWAP-1", "size": 24 << 20}]
    assert volumes.swap("swap") == 0
    for other in ({"serial": "SWAP-2"}, {"size": 25 << 20}):
        volumes.SETTINGS["swap"] = [{"name": "swap", "serial": "SWAP-1", "size": 24 << 20} | other]
        assert volumes.swap("swap") == 1
    volumes.SETTINGS["swap"] = [{"name": "swap", "serial": "SWAP-1", "size": 24 << 20}]
    # It was made a RAID member; the mark's first copy is still there.
    with disk.open("r+b") as stream:
        stream.seek((24 << 20) - (24 << 20) % (64 << 10) - (64 << 10))
        stream.write(bytes.fromhex("fc4e2ba9000000005a000000") + bytes(4084))
    assert volumes.swap("swap") == 1
    (tmp_path / uuid).unlink()
    assert volumes.swap("swap") == 1


# ---------------------------------------------------------------- the negative proof
ALONE = """
import importlib.machinery, importlib.util, json, sys
from pathlib import Path
loader = importlib.machinery.SourceFileLoader("llmkeep_volumes", sys.argv[1])
volumes = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(volumes)
print(json.dumps(volumes.alone(Path(sys.argv[2]), b"1234", {"left-behind": sys.argv[3].encode(), "other": b"x"})))
"""


@pytest.mark.parametrize(("tried", "opens"), [("a key", ["left-behind"]), ("another one", [])])
def test_out_of_the_hsms_reach_a_key_that_was_left_behind_opens_and_nothing_else_does(
    tried: str, opens: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "header"
    with copy.open("wb") as stream:
        stream.truncate(20 << 20)
    argv = ["cryptsetup", "luksFormat", "--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]
    subprocess.run([*argv, "--key-file=-", str(copy)], input=b"a key", check=True)
    done = subprocess.run(
        [sys.executable, "-B", "-c", ALONE, str(PROGRAM), str(copy), tried],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine gives no namespaces")
    assert json.loads(done.stdout) == opens, done.stderr
