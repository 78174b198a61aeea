"""What operators do with volumes that exist, on image files: escrow to another key, erase, drill; each of them killed.

3 kills of each verb, or as many as STORM says, from the seed SEED.
"""

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from kill_points import KillPoints
from luks_estate import PIN, SOFTHSM, Estate, luks, tool, volume
from plugin_modules import load

hsm, atomic, pkcs11 = (
    load("module_utils.hsm.token_keys"),
    load("module_utils.config.files"),
    load("module_utils.hsm.pkcs11"),
)
luks_escrow, luks_escrow_drill = load("modules.luks_escrow"), load("modules.luks_escrow_drill")
luks_erase, hsm_key = load("modules.luks_erase"), load("modules.hsm_key")
KILLS = int(os.environ.get("STORM", "3"))
SEED = int(os.environ.get("SEED", "5"))
PLACES = ("DISK-1", "state", "control", "folder", "tokens")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Estate:
    """A volume that was once enrolled with host1, and is with host1-2; its old header; a second escrow key."""
    estate = Estate(tmp_path_factory.mktemp("finished"))
    estate.make()
    estate.run()
    (estate.root / "old-header").write_bytes(luks.backup(estate.disk))
    for token in ("main", "spare"):
        estate.new_key(token, "host1-2")
    estate.run(key="host1-2", rotate=["hsm", "spare", "recovery"])
    (estate.state / "swap.swap.json").write_text(
        '{"serial": "SWAP-1", "uuid": "", "done": true}'
    )  # no volume's
    tool("openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-days", "30", "-subj", "/CN=escrow 2",
         "-keyout", estate.root / "escrow-2.key", "-out", estate.root / "escrow-2.pem")  # fmt: skip
    keep(estate)
    return estate


@pytest.fixture
def estate(finished: Estate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    root = tmp_path / "estate"
    shutil.copytree(finished.root, root)
    made = Estate(root)
    made.conf.write_text(made.conf.read_text().replace(str(finished.root), str(root)))
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    return made


def keep(estate: Estate) -> None:
    """In the control node's folder, as luks_escrow does."""
    known = record(estate)
    given = {"volume": "host1/data", "uuid": known["uuid"], "serial": "DISK-1"}
    cms = {f"{kind}_cms": (estate.store / f"{kind}.cms").read_text() for kind in ("recovery", "header")}
    luks_escrow.store(estate.root / "folder", given | cms, False)


def record(estate: Estate) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((estate.state / "data.json").read_text())
    return found


def killed_anywhere(
    estate: Estate, functions: list[tuple[Any, str]], work: Callable[[], None], holds: Callable[[], None]
) -> None:
    """Kill WORK at points of it; after a plain run it has to have ended, and HOLDS says what is true then."""

    def copied(source: Path, target: Path) -> None:
        if target.is_dir():
            shutil.rmtree(target)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    kept = estate.root / "kept"
    kept.mkdir()
    for name in PLACES:
        copied(estate.root / name, kept / name)

    def restore() -> None:
        for name in PLACES:
            copied(kept / name, estate.root / name)

    storm, chance = KillPoints(estate.root / "points", functions), random.Random(SEED)  # noqa: S311
    points = range(1, storm.points(work) + 1)
    holds()
    for at in points if len(points) <= KILLS else chance.sample(points, KILLS):
        restore()
        assert storm.run(work, at) == "killed", at
        assert storm.run(work) == "done", at
        holds()
    print(f"seed {SEED}: {min(KILLS, len(points))} of {len(points)} points")


# ---------------------------------------------------------------- the escrow key
def to_the_new_escrow_key(estate: Estate) -> None:
    estate.run(key="host1-2", rotate=["escrow"], escrow=(estate.root / "escrow-2.pem").read_text())


def opens_by(estate: Estate, key: str) -> bool:
    """Whether the owner of an escrow key opens the volume by what the control node has now."""
    argv = ["openssl", "cms", "-decrypt", "-inform", "PEM", "-binary", "-inkey", str(estate.root / key)]
    code, out, _words = luks.run([*argv, "-in", str(estate.store / "recovery.cms")])
    header_code, header, _words = luks.run([*argv, "-in", str(estate.store / "header.cms")])
    if code != 0 or header_code != 0:
        return False
    assert header.startswith(b"LUKS")
    return luks.opens(estate.disk, json.loads(out)["recovery_key"].encode()) is not None


def test_another_escrow_key_is_for_a_person_until_rotation_is_asked_for(estate: Estate) -> None:
    new = (estate.root / "escrow-2.pem").read_text()
    with pytest.raises(volume.NeedsPerson, match=r"another escrow key.*luks_rotate \[escrow\]"):
        estate.run(key="host1-2", escrow=new)
    old_recovery_key = estate.recovery_key()
    to_the_new_escrow_key(estate)
    assert opens_by(estate, "escrow-2.key")
    assert not opens_by(estate, "escrow.key")
    assert luks.opens(estate.disk, old_recovery_key) is None
    again = estate.run(key="host1-2", rotate=["escrow"], escrow=new)
    assert again.changes == []


def test_a_change_of_the_escrow_key_that_was_killed_anywhere_goes_on(estate: Estate) -> None:
    def holds() -> None:
        assert opens_by(estate, "escrow-2.key")
        assert not opens_by(estate, "escrow.key")
        header = luks.read(estate.disk)
        owners = [slot["owner"] for slot in estate.volume(key="host1-2").inventory(header)]
        assert sorted(owners) == ["hsm", "recovery", "spare"]

    functions = [(luks, "add_key"), (luks, "wipe"), (luks, "own"), (atomic, "write_file")]
    killed_anywhere(estate, functions, functools.partial(to_the_new_escrow_key, estate), holds)


# ---------------------------------------------------------------- erase
def erase(estate: Estate) -> None:
    """As playbooks/erase.yml does it."""
    state, folder = estate.state, estate.root / "folder"
    uuid = json.loads((estate.root / "state.uuid").read_text())
    certificate = state / "data.erased.json"
    gone = certificate.exists() and not (state / "data.json").exists()
    labels = (
        json.loads(certificate.read_text())["hsm_keys_destroyed"]
        if gone
        else sorted(luks_erase.doomed(state, "data", uuid)[1])
    )
    settings = hsm.Settings(module=SOFTHSM, tokens=["main", "spare"], label="")
    hsm.bounded(functools.partial(hsm_key.destroy, settings, labels, PIN.encode(), False), 20)
    done = (
        json.loads(certificate.read_text())
        if gone
        else luks_erase.erase(state, "data", uuid, str(estate.disk), PIN.encode(), 20)
    )
    said = {"volume": "host1/data", "uuid": uuid, "serial": "DISK-1", "certificate": done}
    luks_escrow.bury(folder, said, False)


def test_an_erasure_destroys_every_key_that_ever_opened_the_volume_wherever_it_was_killed(
    estate: Estate,
) -> None:
    (estate.root / "state.uuid").write_text(json.dumps(record(estate)["uuid"]))

    def holds() -> None:
        name = f"host1-data.{json.loads((estate.root / 'state.uuid').read_text())}.json"
        certificate = json.loads((estate.root / "folder/erased" / name).read_text())
        assert certificate["hsm_keys_destroyed"] == ["host1", "host1-2"]
        assert sorted(certificate["escrow_destroyed_sha256"]) == [
            "host1-data.header.cms",
            "host1-data.recovery.cms",
        ]
        assert [path.name for path in (estate.root / "folder").iterdir()] == ["erased"]
        assert luks.read(estate.disk) is None
        with estate.disk.open("r+b") as stream:  # a copy of the header from before the rotation
            stream.write((estate.root / "old-header").read_bytes())
        assert not estate.ways_in() & {"hsm", "spare"}

    functions = [
        (pkcs11.Session, "destroy"),
        (luks, "must"),
        (luks_erase, "overwrite"),
        (luks_erase, "keep"),
        (atomic, "write_file"),
        (Path, "unlink"),
    ]
    killed_anywhere(estate, functions, functools.partial(erase, estate), holds)


def test_an_erasure_shows_a_wrong_pin_once(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    estate.set_pin("000000")
    given = {
        "name": "data",
        "uuid": record(estate)["uuid"],
        "device": str(estate.disk),
        "state_dir": str(estate.state),
        "pin_credential": str(estate.root / "hsm-pin"),
    }
    before = estate.disk.read_bytes()
    assert "the token rejected the PIN" in called(luks_erase, given, capsys)["msg"]
    assert "not tried again until another one is sealed" in called(luks_erase, given, capsys)["msg"]
    assert estate.disk.read_bytes() == before


def test_a_key_that_another_volume_is_enrolled_with_is_not_destroyed(estate: Estate) -> None:
    uuid, before = record(estate)["uuid"], estate.disk.read_bytes()
    (estate.state / "other.json").write_text((estate.state / "data.json").read_text())
    with pytest.raises(volume.Refused, match=r"other is enrolled with host1-2 too.*rotate_hsm_key"):
        luks_erase.doomed(estate.state, "data", uuid)
    with pytest.raises(volume.Refused, match="nothing was erased"):
        luks_erase.erase(estate.state, "data", uuid, str(estate.disk), PIN.encode(), 20)
    assert estate.disk.read_bytes() == before


# ---------------------------------------------------------------- the drill
def test_a_drill_that_was_killed_anywhere_leaves_the_register_whole(estate: Estate) -> None:
    folder = estate.root / "folder"

    def work() -> None:
        entry = luks_escrow_drill.drill(folder, "host1/data", estate.root / "escrow.key")
        luks_escrow_drill.note(folder, "host1/data", entry)

    def holds() -> None:
        assert json.loads((folder / "host1-data.json").read_text())["drilled"]
        assert [entry["volume"] for entry in luks_escrow.register(folder)] == ["host1/data"]

    functions = [
        (luks_escrow_drill, "opened"),
        (luks, "opens"),
        (atomic, "write_beside"),
        (atomic, "write_file"),
    ]
    killed_anywhere(estate, functions, work, holds)
