"""luks_volume with real cryptsetup, systemd-cryptenroll and SoftHSM, on image files.

Left to lab hosts, since an image file is not activated: the file system, and all that needs device-mapper.
"""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from called_module import called
from luks_estate import PIN, SIZE, SOFTHSM, Estate, disks, luks, sealing, tool, volume, volume_phases
from plugin_modules import load

luks_escrow, luks_escrow_drill = load("modules.luks_escrow"), load("modules.luks_escrow_drill")
luks_volume = load("modules.luks_volume")
luks_erase, hsm_key = load("modules.luks_erase"), load("modules.hsm_key")
hsm, pins = load("module_utils.hsm.token_keys"), load("module_utils.hsm.pins")
DATA = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An estate with a finished volume that holds data: made once, copied for each test."""
    estate = Estate(tmp_path_factory.mktemp("finished"))
    estate.make()
    estate.run()
    estate.put_data(DATA)
    return estate.root


@pytest.fixture
def estate(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    root = tmp_path / "estate"
    shutil.copytree(finished, root)
    made = Estate(root)
    made.conf.write_text(made.conf.read_text().replace(str(finished), str(root)))
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    return made


@pytest.fixture
def blank(estate: Estate) -> Estate:
    """The same estate before it had a volume."""
    shutil.rmtree(estate.state)
    shutil.rmtree(estate.store)
    estate.store.mkdir()
    estate.blank()
    return estate


def digest(estate: Estate) -> bytes:
    return estate.disk.read_bytes()


def owners(estate: Estate) -> dict[int, str]:
    found = luks.read(estate.disk)
    return {entry["slot"]: entry["owner"] for entry in estate.volume().inventory(found)}


def record(estate: Estate) -> dict[str, object]:
    found: dict[str, object] = json.loads((estate.state / "data.json").read_text())
    return found


# ---------------------------------------------------------------- the whole way
def test_a_finished_volume_opens_by_hsm_spare_and_recovery_key_and_by_nothing_else(estate: Estate) -> None:
    assert estate.ways_in() == {"hsm", "spare", "recovery"}
    assert sorted(owners(estate).values()) == ["hsm", "recovery", "spare"]
    header = luks.read(estate.disk)
    assert header.segment["encryption"] == "aes-xts-plain64"
    assert {slot["key_size"] * 8 for slot in header.slots.values()} == {512}


def test_nothing_stays_behind_on_the_host(estate: Estate) -> None:
    estate.run()
    assert {path.name for path in estate.state.iterdir()} == {"data.json", "data.lock"}
    everything = b"".join(path.read_bytes() for path in estate.state.iterdir())
    assert estate.recovery_key() not in everything
    assert PIN.encode() not in everything + luks.backup(estate.disk)


def test_a_second_run_changes_nothing(estate: Estate) -> None:
    before = digest(estate)
    made = estate.run()
    assert (made.changes, digest(estate) == before) == ([], True)


def test_the_escrowed_header_brings_a_lost_one_back(estate: Estate, tmp_path: Path) -> None:
    estate.put_data(DATA)
    with estate.disk.open("r+b") as stream:
        stream.write(bytes(8 << 20))
    with pytest.raises(
        volume.NeedsPerson, match=r"needs a person: .*no LUKS2 header now.*Restore the header"
    ):
        estate.run()
    backup = tmp_path / "header"
    backup.write_bytes(estate.opened("header"))
    tool("cryptsetup", "luksHeaderRestore", "--batch-mode", estate.disk, "--header-backup-file", backup)
    assert estate.ways_in() == {"hsm", "spare", "recovery"}
    assert estate.run().changes == []
    assert estate.data(len(DATA)) == DATA


def test_check_mode_says_what_would_be_done_and_does_nothing(blank: Estate) -> None:
    before = digest(blank)
    made = blank.volume()
    volume_phases.converge(made, check=True)
    assert made.changes == [f"format {blank.disk} (DISK-1) for data"]
    assert (digest(blank) == before, blank.state.exists()) == (True, False)


def test_the_first_key_stays_until_the_control_node_has_recovery_key_and_header(blank: Estate) -> None:
    for _ in range(2):  # nothing is stored in between
        made = blank.call()
        assert made.known.phase == "escrow"
        assert "bootstrap" in blank.ways_in()
    wrong = blank.volume(stored={"recovery": "0" * 64, "header": made.known.header_sha256})
    volume_phases.converge(wrong)
    assert wrong.known.phase == "escrow"
    blank.keep(made)
    assert blank.run().known.phase == "done"
    assert blank.ways_in() == {"hsm", "spare", "recovery"}


def test_what_came_back_and_was_never_stored_is_made_anew_where_it_got_lost(blank: Estate) -> None:
    blank.call()
    (blank.state / "data.recovery.cms").unlink()
    blank.run()
    assert blank.ways_in() == {"hsm", "spare", "recovery"}
    assert sorted(owners(blank).values()) == ["hsm", "recovery", "spare"]


# ---------------------------------------------------------------- refusals
def test_a_foreign_luks_volume_is_never_touched(blank: Estate) -> None:
    tool("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
         blank.disk, "-", given=b"theirs")  # fmt: skip
    before = digest(blank)
    with pytest.raises(volume.Refused, match="LUKS volume"):
        blank.run()
    assert digest(blank) == before


def test_a_foreign_volume_in_the_place_of_ours_is_for_a_person(estate: Estate) -> None:
    tool("cryptsetup", "luksUUID", "-q", "--uuid", "11111111-2222-4333-8444-555555555555", estate.disk)
    before = digest(estate)
    with pytest.raises(volume.NeedsPerson, match="Were disks swapped"):
        estate.run()
    assert digest(estate) == before


@pytest.mark.parametrize("known", [False, True], ids=["data on it", "in the register"])
def test_a_disk_that_speaks_against_it_is_not_formatted_and_not_one_byte_changes(
    blank: Estate, known: bool
) -> None:
    registered = [disks.Registered("9f0e", "DISK-1", "llm9/data")] if known else []
    if not known:
        blank.put_data(b"a file of another system")
    before = digest(blank)
    with pytest.raises(volume.Refused, match="is not formatted for data"):
        blank.run(registered=registered)
    assert digest(blank) == before


def test_a_disk_that_was_blank_when_planned_and_is_not_now_is_for_a_person(blank: Estate) -> None:
    made = blank.volume()
    blank.state.mkdir()
    volume_phases.plan(made, check=False)
    blank.put_data(b"somebody's")
    before = digest(blank)
    with pytest.raises(volume.NeedsPerson, match="was blank then and is not now"):
        blank.run()
    assert digest(blank) == before


def test_destroy_reaches_only_its_disk_and_never_a_volume_that_is_whole(estate: Estate) -> None:
    before = digest(estate)
    assert estate.run(destroy="DISK-1").changes == []
    assert digest(estate) == before
    with estate.disk.open("r+b") as stream:
        stream.write(bytes(8 << 20))
    with pytest.raises(volume.NeedsPerson):
        estate.run(destroy="DISK-2")
    uuid = record(estate)["uuid"]
    estate.run(destroy="DISK-1")
    assert record(estate)["uuid"] != uuid
    assert estate.ways_in() == {"hsm", "spare", "recovery"}


def test_a_wrong_pin_is_shown_once(blank: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    blank.set_pin("000000")
    log = blank.root / "spied"
    wrapper = blank.root / "bin"
    wrapper.mkdir()
    (wrapper / "systemd-cryptenroll").write_text(
        f'#!/bin/sh\nexec /usr/bin/systemd-cryptenroll "$@" 2>> {log}\n'
    )
    (wrapper / "systemd-cryptenroll").chmod(0o755)
    monkeypatch.setitem(luks.ENVIRONMENT, "PATH", f"{wrapper}:{luks.ENVIRONMENT['PATH']}")
    real = luks.refused

    def words_in_the_log(words: str) -> None:
        real(log.read_text() if log.exists() else words)

    monkeypatch.setattr(luks, "refused", words_in_the_log)
    with pytest.raises(pins.Fault, match="tried once"):
        blank.run()
    with pytest.raises(pins.Fault, match="not tried again until another one is sealed"):
        blank.run()
    assert log.read_text().count("is incorrect") == 1
    monkeypatch.setattr(luks, "refused", real)
    blank.set_pin(PIN)
    blank.run()
    assert blank.ways_in() == {"hsm", "spare", "recovery"}


def test_check_mode_tells_of_a_pin_that_was_refused(estate: Estate) -> None:
    credential, boot = estate.root / "hsm-pin", estate.root / "boot-pin"
    boot.write_bytes(sealing.seal("boot-pin", PIN.encode()))
    pins.remember(credential, credential.read_bytes())
    with pytest.raises(pins.Fault, match="rejected the PIN"):
        volume_phases.converge(estate.volume(boot_credential=boot), check=True)


def test_a_token_that_is_not_there_ends_in_bounded_time_and_the_next_run_goes_on(blank: Estate) -> None:
    (blank.root / "tokens").rename(blank.root / "away")
    (blank.root / "tokens").mkdir()
    with pytest.raises(luks.Failed, match="token=main"):
        blank.run(hsm_seconds=5)
    assert blank.ways_in() == {"bootstrap"}
    (blank.root / "tokens").rmdir()
    (blank.root / "away").rename(blank.root / "tokens")
    blank.run()
    assert blank.ways_in() == {"hsm", "spare", "recovery"}


def test_a_slot_that_nobody_owns_is_for_a_person(estate: Estate) -> None:
    luks.add_key(estate.disk, b"a consultant's", by_key=estate.recovery_key())
    before = digest(estate)
    with pytest.raises(volume.NeedsPerson, match=r"key slots without a known owner: \[0\]"):
        estate.run()
    assert digest(estate) == before


def test_another_key_than_enrolled_is_for_a_person_until_rotation_is_asked_for(estate: Estate) -> None:
    for token in ("main", "spare"):
        estate.new_key(token, "host1-v2")
    with pytest.raises(volume.NeedsPerson, match=r"another key of hsm, spare.*rotate-keys.yml"):
        estate.run(key="host1-v2")
    estate.run(key="host1-v2", rotate=["hsm", "spare", "recovery"])
    header = luks.read(estate.disk)
    uris = {token.get("pkcs11-uri", "") for token in header.tokens.values()}
    assert not any("object=host1;" in uri for uri in uris)
    assert estate.ways_in() == {"hsm", "spare", "recovery"}
    assert estate.data(len(DATA)) == DATA


def test_a_slot_that_was_taken_away_is_enrolled_again(estate: Estate) -> None:
    (recovery,) = [slot for slot, owner in owners(estate).items() if owner == "recovery"]
    luks.wipe(estate.disk, recovery)
    estate.run()
    assert estate.ways_in() == {"hsm", "spare", "recovery"}


def test_a_recovery_key_whose_escrow_is_lost_is_made_anew(estate: Estate) -> None:
    estate.run()
    old = estate.recovery_key()
    (estate.store / "recovery.cms").unlink()
    estate.run()
    assert luks.opens(estate.disk, old) is None
    assert estate.ways_in() == {"hsm", "spare", "recovery"}


def test_a_host_installed_anew_takes_its_volume_over_and_only_if_its_own_key_opens_it(estate: Estate) -> None:
    shutil.rmtree(estate.state)
    with pytest.raises(volume.NeedsPerson, match="open it with the recovery key"):
        estate.run(key="host2")
    with pytest.raises(volume.Refused, match="LUKS volume"):
        estate.run(known_as="host2/data")
    shutil.rmtree(estate.state, ignore_errors=True)
    estate.run()
    assert estate.ways_in() == {"hsm", "spare", "recovery"}
    assert estate.data(len(DATA)) == DATA


def test_two_runs_at_once_are_refused(estate: Estate) -> None:
    first, second = estate.volume(), estate.volume()
    with first.alone(), pytest.raises(volume.Refused, match="another run"), second.alone():
        pass


# ---------------------------------------------------------------- the drill
def test_the_drill_opens_a_copy_by_the_recovery_key_and_notes_the_day(estate: Estate, tmp_path: Path) -> None:
    folder = tmp_path / "storage"
    given = {"volume": "host1/data", "uuid": record(estate)["uuid"], "serial": "DISK-1"}
    cms = {f"{kind}_cms": (estate.store / f"{kind}.cms").read_text() for kind in ("recovery", "header")}
    luks_escrow.store(folder, given | cms, False)
    before = digest(estate)
    entry = luks_escrow_drill.drill(folder, "host1/data", estate.root / "escrow.key")
    assert owners(estate)[entry["drilled_slot"]] == "recovery"
    assert digest(estate) == before
    with pytest.raises(luks_escrow_drill.Refused, match="has no volume host1/other; it has host1-data"):
        luks_escrow_drill.drill(folder, "host1/other", estate.root / "escrow.key")
    tool("openssl", "genpkey", "-algorithm", "RSA", "-out", tmp_path / "other.key")
    with pytest.raises(luks_escrow_drill.Refused, match=r"Is .*other.key the escrow key"):
        luks_escrow_drill.drill(folder, "host1/data", tmp_path / "other.key")


def test_the_drill_takes_the_escrow_keys_passphrase_from_a_file_that_root_alone_reads(
    estate: Estate, tmp_path: Path
) -> None:
    folder, key, file = tmp_path / "storage", tmp_path / "locked.key", tmp_path / "passphrase"
    given = {"volume": "host1/data", "uuid": record(estate)["uuid"], "serial": "DISK-1"}
    cms = {f"{kind}_cms": (estate.store / f"{kind}.cms").read_text() for kind in ("recovery", "header")}
    luks_escrow.store(folder, given | cms, False)
    file.write_text("six words that are hard to guess\n")
    file.chmod(0o600)
    tool(
        "openssl",
        "pkcs8",
        "-topk8",
        "-in",
        estate.root / "escrow.key",
        "-out",
        key,
        "-passout",
        f"file:{file}",
    )
    assert luks_escrow_drill.drill(folder, "host1/data", key, file)["drilled"]
    with pytest.raises(luks_escrow_drill.Refused, match="its passphrase correct"):
        luks_escrow_drill.drill(folder, "host1/data", key)
    file.chmod(0o644)
    with pytest.raises(luks_escrow_drill.Refused, match="mode 0644 and belongs to"):
        luks_escrow_drill.drill(folder, "host1/data", key, file)


def test_a_recovery_key_of_another_time_fails_the_drill(estate: Estate, tmp_path: Path) -> None:
    folder = tmp_path / "storage"
    old = (estate.store / "header.cms").read_text()
    estate.run(rotate=["recovery"])
    given = {"volume": "host1/data", "uuid": record(estate)["uuid"], "serial": "DISK-1"}
    cms = {"recovery_cms": (estate.store / "recovery.cms").read_text(), "header_cms": old}
    luks_escrow.store(folder, given | cms, False)
    with pytest.raises(luks_escrow_drill.Refused, match="does not open its header backup"):
        luks_escrow_drill.drill(folder, "host1/data", estate.root / "escrow.key")


# ---------------------------------------------------------------- the end of a volume
def erase(estate: Estate, uuid: str) -> dict[str, object]:
    found: dict[str, object] = luks_erase.erase(
        estate.state, "data", uuid, str(estate.disk), PIN.encode(), 20
    )
    return found


def test_a_volume_is_erased_only_once_its_keys_in_the_hsm_are_destroyed(estate: Estate) -> None:
    uuid, before, old_header = str(record(estate)["uuid"]), digest(estate), luks.backup(estate.disk)
    with pytest.raises(volume.Refused, match=r"token=main.*still opens data"):
        erase(estate, uuid)
    with pytest.raises(volume.Refused, match="is to be erased; nothing was"):
        erase(estate, "another")
    assert digest(estate) == before
    for token in ("main", "spare"):
        settings = hsm.Settings(module=SOFTHSM, tokens=[token], label="host1")
        gone = hsm.bounded(functools.partial(hsm_key.destroy, settings, ["host1"], PIN.encode(), False), 20)
        assert gone == {token: 2}
    certificate = erase(estate, uuid)
    assert certificate["header_opened_by_no_token"]
    assert certificate["uuid"] == uuid
    assert digest(estate)[: 16 << 20].count(0) == 16 << 20
    assert {path.name for path in estate.state.iterdir()} == {"data.erased.json", "data.lock"}
    # A copy of an old header: the HSM no longer opens it, only the recovery key of that time does.
    with estate.disk.open("r+b") as stream:
        stream.write(old_header)
    assert estate.ways_in() == {"recovery"}


def test_an_erasure_that_was_cut_short_goes_on(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = str(record(estate)["uuid"])
    monkeypatch.setattr(luks_erase, "opening", lambda *_words: [])

    def cut(_device: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(luks_erase, "overwrite", cut)
        with pytest.raises(KeyboardInterrupt):
            erase(estate, uuid)
    assert luks.read(estate.disk).slots == {}
    assert erase(estate, uuid)["key_slots_destroyed"]


# ---------------------------------------------------------------- as Ansible calls it
def test_as_a_module_it_returns_what_is_to_be_stored_and_says_when_a_person_is_needed(
    blank: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, object] = {
        "name": "data",
        "serial": "DISK-1",
        "device": str(blank.disk),
        "size": SIZE,
        "token": "pkcs11:token=main;object=host1;type=public",
        "spare": "pkcs11:token=spare;object=host1;type=public",
        "pin_credential": str(blank.root / "hsm-pin"),
        "boot_credential": str(blank.root / "boot-pin"),
        "escrow_certificate": (blank.root / "escrow.pem").read_text(),
        "state_dir": str(blank.state),
    }
    assert called(luks_volume, given | {"_ansible_check_mode": True}, capsys)["changed"]
    assert not blank.state.exists()
    first = called(luks_volume, given, capsys)
    assert (first["state"], first["pending"]) == ("escrow", True)
    stored = {
        kind: hashlib.sha256(first[f"{kind}_cms"].encode()).hexdigest() for kind in ("recovery", "header")
    }
    second = called(luks_volume, given | {"stored": stored}, capsys)
    assert (second["state"], second["pending"], second["key_bits"]) == ("done", False, 512)
    assert [slot["owner"] for slot in second["slots"]] == ["hsm", "spare", "recovery"]
    stored["header"] = hashlib.sha256(second["header_cms"].encode()).hexdigest()
    third = called(luks_volume, given | {"stored": stored}, capsys)
    assert (third["changed"], third["header_cms"], third["recovery_cms"]) == (False, "", "")
    assert sealing.unseal("boot-pin", (blank.root / "boot-pin").read_bytes()) == PIN.encode()
    blank.blank()
    failed = called(luks_volume, given | {"stored": stored}, capsys)
    assert (failed["failed"], failed["needs_person"]) == (True, True)
    assert failed["msg"].startswith("needs a person: ")
    refused = called(luks_volume, given | {"token": "pkcs11:token=main;object=k?pin-value=1"}, capsys)
    assert "never a PIN" in refused["msg"]
    blank.state.joinpath("data.json").unlink()
    given = {
        "name": "data",
        "uuid": "u",
        "pin_credential": given["pin_credential"],
        "state_dir": str(blank.state),
    }
    erased = called(luks_erase, given, capsys)
    assert "no record of a volume data" in erased["msg"]
