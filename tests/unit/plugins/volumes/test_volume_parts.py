"""The parts of an encrypted volume one by one: what sysfs and a header say, the record, and what a phase decides.

Real image files, and cryptsetup where a header counts; no HSM, so each takes a fraction of a second.
"""

import datetime
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from said_by_probes import Probes

disks, luks, record, volume, phases, keys = (
    load(f"module_utils.volumes.{name}") for name in ("disks", "luks", "record", "volume", "phases", "keys")
)
UUID, OTHER = "0b6f9bf4-6d2b-4c53-a1a5-7f6a0c2d9e11", "5a4c1fd0-33c8-4a0b-9a39-0f6d8b1d2c22"
MAIN = "pkcs11:token=main;object=host1;type=public"
KDF = {"kdf": {"type": "pbkdf2"}}


@pytest.fixture(scope="module")
def escrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate to encrypt to."""
    folder = tmp_path_factory.mktemp("escrow")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj",
         "/CN=escrow", "-keyout", folder / "key", "-out", folder / "pem"], check=True, capture_output=True,
    )  # fmt: skip
    return folder / "pem"


@pytest.fixture
def of(image: Path, escrow: Path, tmp_path: Path) -> Any:
    """A finished volume on that image, as its record has it: the HSM in slot 1, the recovery key in slot 2."""
    (tmp_path / "state").mkdir()
    made = volume.Volume(
        "data", "DISK-1", 24 << 20, {"hsm": MAIN}, tmp_path / "pin", escrow.read_text(), tmp_path / "state",
        device=str(image), known_as="host1/data", stored={"recovery": "r", "header": "h"},
    )  # fmt: skip
    slots = {
        str(slot): {"owner": owner, "enrolled": "", "uri": ""}
        for slot, owner in ((1, "hsm"), (2, "recovery"))
    }
    made.record = record.Record("data", "DISK-1", UUID, "done", slots, recovery_sha256="r", header_sha256="h")
    return made


def header(**changes: Any) -> Any:
    """That volume's header, with `changes`."""
    tokens = {
        0: {"type": "systemd-pkcs11", "keyslots": ["1"], "pkcs11-uri": MAIN},
        1: {"type": "systemd-recovery", "keyslots": ["2"]},
    }
    return luks.Header(**{"uuid": UUID, "slots": {1: KDF, 2: KDF}, "tokens": tokens, **changes})


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The header that is read, to be changed by the test."""
    found = {"header": header()}
    monkeypatch.setattr(luks, "read", lambda _path: found["header"])
    return found


# ---------------------------------------------------------------- headers
def test_a_header_relates_slots_and_tokens() -> None:
    found = header(tokens={0: {"keyslots": ["1", "7"]}, 1: {"keyslots": ["2"]}, 2: {"keyslots": []}})
    assert (found.tokens_of(1), found.tokens_of(2), found.tokens_of(3)) == ([0], [1], [])
    assert (found.slots_of(0), found.slots_of(1), found.slots_of(2)) == ([1], [2], [])


def test_a_uri_names_its_path_attributes_but_the_type() -> None:
    assert luks.attributes("pkcs11:token=a%20b;object=x=y;type=private;flag?pin-source=z") == {
        "token": "a%20b",
        "object": "x=y",
    }
    assert luks.attributes("") == {}


def test_a_recovery_key_has_256_bits_in_systemds_alphabet() -> None:
    parts = luks.recovery_key().split("-")
    assert [len(part) for part in parts] == [8] * 8
    assert set("".join(parts)) <= set("cbdefghijklnrtuv")
    assert len({luks.recovery_key() for _ in range(3)}) == 3
    text = "".join(luks.recovery_key() for _ in range(50)).replace("-", "")
    assert set(text) == set("cbdefghijklnrtuv")


def test_a_program_gets_its_input_by_a_pipe_and_no_variable_but_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "SECRET", "SOFTHSM2_CONF", "P11_KIT_SERVER_ADDRESS":
        monkeypatch.setenv(name, f"of {name}")
    code, out, words = luks.run(["sh", "-c", "cat; env; printf ' \\377 \\n' >&2; exit 4"], b"given\n")
    lines = out.decode().splitlines()
    assert (code, words, lines[0]) == (4, "�", "given")
    assert {"SOFTHSM2_CONF=of SOFTHSM2_CONF", "P11_KIT_SERVER_ADDRESS=of P11_KIT_SERVER_ADDRESS"} <= set(
        lines
    )
    assert "LC_ALL=C.UTF-8" in lines
    assert not any("SECRET" in line for line in lines)
    monkeypatch.delenv("SOFTHSM2_CONF")
    assert "SOFTHSM2_CONF" not in luks.environment()


def test_a_program_that_is_missing_slow_or_fails_is_named() -> None:
    with pytest.raises(luks.Failed, match="no-such-program is not installed"):
        luks.run(["no-such-program"])
    with pytest.raises(luks.Failed, match=r"sleep 60 did not end within 0\.01 s"):
        luks.run(["sleep", "60"], seconds=0.01)
    with pytest.raises(luks.Failed, match="do it: sh ended with 3: no message"):
        luks.must(["sh", "-c", "exit 3"], "do it")
    with pytest.raises(luks.Failed, match=f"do it: sh ended with 1: {'x' * 600}$"):
        luks.must(["sh", "-c", f"echo {'y' * 9}{'x' * 600} >&2; exit 1"], "do it")
    assert luks.must(["cat"], "do it", b"given") == b"given"


def test_words_of_a_refused_pin_are_a_fault_and_others_are_not() -> None:
    for words in "x The PIN is incorrect x", "x No token could be unlocked with this PIN":
        with pytest.raises(luks.Fault, match="the token rejected the PIN"):
            luks.refused(words)
    luks.refused("No usable token is available.")


def test_udev_is_shown_only_a_disk_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def succeed(argv: list[str], *_rest: object) -> tuple[int, bytes, str]:
        asked.append(argv)
        return 0, b"", ""

    monkeypatch.setattr(luks, "run", succeed)
    luks.show(Path("/dev/x"), UUID, links=tmp_path)
    assert asked == [["udevadm", "trigger", "--action=change", "--settle", "/dev/x"]]
    (tmp_path / UUID).touch()
    luks.show(Path("/dev/x"), UUID, links=tmp_path)
    assert len(asked) == 1
    monkeypatch.setattr(luks, "run", lambda *_argv, **_more: (1, b"", "why"))
    with pytest.raises(luks.Failed, match="let udev look at the disk: udevadm ended with 1: why"):
        luks.show(Path("/dev/x"), OTHER, links=tmp_path)


def test_a_mapping_is_closed_after_udev_settled_and_tried_ten_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, paused = list[list[str]](), list[float]()
    codes = iter([0, 5, 5, 0])

    def answer(argv: list[str]) -> tuple[int, bytes, str]:
        asked.append(argv)
        return next(codes, 5), b"", "busy"

    monkeypatch.setattr(luks, "run", answer)
    monkeypatch.setattr(luks.time, "sleep", paused.append)
    luks.close("m")
    close = ["cryptsetup", "close", "m"]
    assert asked == [["udevadm", "settle", "--timeout=10"], close, close, close]
    asked.clear()
    with pytest.raises(luks.Failed, match="m cannot be closed: busy"):
        luks.close("m")
    assert asked[1:] == [close] * 10
    assert paused[2:] == pytest.approx([0.1 * number for number in range(10)])


def test_a_key_opens_its_own_slot_and_another_opens_none(image: Path) -> None:
    assert luks.read(image) is None
    luks.format_device(image, UUID, "label", b"first")
    assert luks.opens(image, b"first") == 0
    assert luks.opens(image, b"wrong") is None
    luks.add_key(image, b"second", by_key=b"first")
    assert luks.opens(image, b"second") == 1
    with pytest.raises(luks.Failed, match="add a key slot: cryptsetup ended with 2"):
        luks.add_key(image, b"third", by_key=b"wrong")
    found = luks.read(image)
    assert found
    assert (found.uuid, found.slots.keys(), found.tokens) == (UUID, {0, 1}, {})
    assert (found.segment["encryption"], found.segment["offset"]) == ("aes-xts-plain64", str(16 << 20))
    assert {slot["kdf"]["type"] for slot in found.slots.values()} == {"pbkdf2"}
    luks.own(image, 1, "systemd-recovery")
    named = luks.read(image)
    assert named
    assert named.tokens == {0: {"type": "systemd-recovery", "keyslots": ["1"]}}
    saved = luks.backup(image)
    assert saved.startswith(b"LUKS\xba\xbe")
    luks.forget(image, 0)
    luks.wipe(image, 1)
    gone = luks.read(image)
    assert gone
    assert (gone.slots.keys(), gone.tokens) == ({0}, {})
    with image.open("r+b") as stream:
        stream.write(bytes(4096))
    assert luks.uuid_on(image) == UUID, "by the second header"


def test_a_token_that_is_away_is_no_proof(image: Path) -> None:
    luks.format_device(image, UUID, "label", b"first")
    with pytest.raises(luks.Failed, match=f"token 0 of the header does not open {image}: "):
        luks.prove(image, 0, b"pin", 30)


# ---------------------------------------------------------------- the volume and its record
def test_a_record_is_written_for_its_owner_alone_and_read_again(of: Any, tmp_path: Path) -> None:
    of.save("escrow")
    path = tmp_path / "state/data.json"
    assert path.stat().st_mode & 0o777 == 0o600
    again = volume.Volume("data", "DISK-1", 1, {}, tmp_path, "", tmp_path / "state", device=str(of.path))
    assert (again.record, again.known.phase, again.path) == (of.record, "escrow", of.path)
    again.save()
    assert json.loads(path.read_text())["phase"] == "escrow"
    again.drop("json")
    again.drop("json")
    assert not path.exists()
    again.record = None
    with pytest.raises(record.Refused, match="data has no record"):
        _ = again.known
    with pytest.raises(record.Refused, match="none cannot be read"):
        volume.Volume("data", "X", 1, {}, tmp_path, "", tmp_path, device=str(tmp_path / "none"))


def test_the_file_system_of_a_volume_can_have_the_kernel_check_what_is_read(tmp_path: Path) -> None:
    with (tmp_path / "volume").open("wb") as stream:
        stream.truncate(16 << 20)
    subprocess.run([*record.MKFS["ext4"], tmp_path / "volume"], check=True)
    told = subprocess.run(["dumpe2fs", "-h", tmp_path / "volume"], capture_output=True, text=True, check=True)
    assert re.search(r"^Filesystem features:.* verity\b", told.stdout, re.MULTILINE)


def test_one_run_at_a_time_in_a_folder_of_its_own(of: Any, tmp_path: Path) -> None:
    of.state_dir = tmp_path / "new/state"
    with of.alone():
        assert of.state_dir.stat().st_mode & 0o777 == 0o700
        with pytest.raises(record.Refused, match="another run works on data"), of.alone():
            pass
    with of.alone():
        pass


def test_a_header_of_another_volume_or_none_is_for_a_person(of: Any, on_disk: dict[str, Any]) -> None:
    assert of.header() == header()
    on_disk["header"] = header(uuid=OTHER)
    with pytest.raises(record.NeedsPerson, match=f"needs a person: .*{OTHER}, and data has {UUID}"):
        of.header()
    on_disk["header"] = None
    with pytest.raises(record.NeedsPerson, match="has no LUKS2 header now"):
        of.header()


def test_an_owners_token_is_that_of_a_slot_which_exists_and_stays(of: Any) -> None:
    assert (of.token_of("hsm", header()), of.token_of("recovery", header())) == (0, 1)
    assert of.token_of("spare", header()) is None
    assert of.token_of("hsm", header(slots={2: KDF})) is None
    assert of.token_of("hsm", header(tokens={})) is None
    of.record.retiring = [1]
    assert of.token_of("hsm", header()) is None
    of.record.slots["3"] = {"owner": "hsm", "enrolled": "", "uri": ""}
    later = header(slots={1: KDF, 3: KDF}, tokens={0: {"keyslots": ["1"]}, 4: {"keyslots": ["3"]}})
    assert of.token_of("hsm", later) == 4


def test_a_slot_that_opens_is_recorded_and_the_former_one_retires(of: Any) -> None:
    of.own(5, "hsm")
    before = datetime.datetime.now(datetime.UTC)
    slot = of.record.slots["5"]
    assert (slot["owner"], slot["uri"], of.record.retiring) == ("hsm", MAIN, [1])
    enrolled = datetime.datetime.fromisoformat(slot["enrolled"])
    assert (enrolled.microsecond, enrolled.utcoffset()) == (0, datetime.timedelta())
    assert before - enrolled < datetime.timedelta(minutes=1)
    of.own(5, "hsm")
    of.own(6, "recovery")
    assert (of.record.retiring, of.record.slots["6"]["uri"]) == ([1, 2], "")
    assert json.loads(of.at("json").read_text())["retiring"] == [1, 2]
    of.retire("hsm")
    assert of.record.retiring == [1, 2, 5]
    assert of.record.owned_by("hsm") == [1, 5]


def test_a_volume_is_escrowed_when_the_control_node_has_both(of: Any) -> None:
    assert of.escrowed()
    for stored in (
        {"recovery": "r"},
        {"header": "h"},
        {"recovery": "x", "header": "h"},
        {"recovery": "r", "header": "x"},
    ):
        of.stored = stored
        assert not of.escrowed()


def test_what_is_to_be_stored_is_told_until_it_is(of: Any) -> None:
    assert of.cms("recovery", "new") == "", "the host has none either"
    of.keep("recovery.cms", b"CMS")
    assert (of.cms("recovery", "new"), of.cms("recovery", "r"), of.cms("header", "new")) == ("CMS", "", "")
    for phase, told in ("planned", ""), ("keys", ""), ("escrow", "CMS"), ("wiping", "CMS"):
        of.record.phase = phase
        assert of.cms("recovery", "new") == told
    of.record = None
    assert of.cms("recovery", "new") == ""


def test_the_inventory_has_each_slot_with_owner_kind_and_key(of: Any) -> None:
    found = of.inventory(header(slots={2: KDF, 1: KDF, 7: {"kdf": {"type": "argon2id"}}}))
    assert found == [
        {"slot": 1, "owner": "hsm", "enrolled": "", "uri": MAIN, "type": "systemd-pkcs11", "kdf": "pbkdf2"},
        {
            "slot": 2,
            "owner": "recovery",
            "enrolled": "",
            "uri": "",
            "type": "systemd-recovery",
            "kdf": "pbkdf2",
        },
        {"slot": 7, "owner": "unknown", "enrolled": "", "uri": "", "type": "password", "kdf": "argon2id"},
    ]
    for phase, owner in (
        ("planned", "unknown"),
        ("keys", "bootstrap"),
        ("escrow", "bootstrap"),
        ("wiping", "bootstrap"),
        ("filesystem", "unknown"),
    ):
        of.record.phase = phase
        assert of.inventory(header(slots={7: KDF}))[0]["owner"] == owner
    assert of.inventory(None) == []
    of.record = None
    assert of.inventory(header()) == []


def test_a_certificate_is_known_by_its_der(escrow: Path) -> None:
    command = ["openssl", "x509", "-in", str(escrow), "-outform", "DER"]
    der = subprocess.run(command, check=True, capture_output=True).stdout
    pem, wanted = escrow.read_text(), hashlib.sha256(der).hexdigest()
    assert keys.certificate_sha256(pem) == keys.certificate_sha256(f"a line\n{pem}\n\n") == wanted


# ---------------------------------------------------------------- phases
def test_what_neither_host_nor_control_node_has_is_made_anew(of: Any) -> None:
    of.record.phase, of.stored = "escrow", {"header": "h"}
    of.keep("recovery.cms", b"")
    of.keep("header.cms", b"")
    phases.still_to_escrow(of)
    assert (of.record.phase, of.record.retiring) == ("escrow", [])
    of.drop("header.cms")
    of.stored = {"recovery": "r"}
    phases.still_to_escrow(of)
    assert (of.record.phase, of.record.retiring) == ("keys", []), "the control node has the recovery key"
    of.record.phase, of.stored = "escrow", {}
    of.keep("header.cms", b"")
    of.drop("recovery.cms")
    phases.still_to_escrow(of)
    assert (of.record.phase, of.record.retiring) == ("keys", [2])


def compared(of: Any, check: bool = False) -> tuple[str, list[int], list[str]]:
    """Phase, retiring slots and changes after a comparison."""
    of.changes.clear()
    phases.compare(of, check)
    return of.record.phase, of.record.retiring, of.changes


@pytest.mark.usefixtures("on_disk")
def test_a_finished_volume_as_wanted_is_left_as_it_is(of: Any) -> None:
    assert compared(of) == ("done", [], [])


def test_a_slot_without_an_owner_is_for_a_person(of: Any, on_disk: dict[str, Any]) -> None:
    on_disk["header"] = header(slots={1: KDF, 2: KDF, 5: KDF})
    with pytest.raises(record.NeedsPerson, match=r"without a known owner: \[5\]"):
        compared(of)


def test_a_lost_slot_is_enrolled_anew_and_only_named_in_check_mode(of: Any, on_disk: dict[str, Any]) -> None:
    on_disk["header"] = header(slots={2: KDF})
    assert compared(of, check=True) == ("done", [], ["enrol hsm of data again"])
    assert compared(of) == ("keys", [], ["enrol hsm of data again"])


@pytest.mark.usefixtures("on_disk")
def test_another_key_is_for_a_person_until_it_is_rotated(of: Any) -> None:
    of.tokens = {"hsm": MAIN.replace("host1", "host2")}
    with pytest.raises(record.NeedsPerson, match="another key of hsm than the present one"):
        compared(of)
    of.rotate = ["hsm"]
    assert compared(of) == ("keys", [1], ["enrol hsm of data again"])
    of.record.phase, of.record.retiring, of.tokens, of.rotate = "done", [], {"hsm": MAIN}, ["recovery"]
    assert compared(of) == ("keys", [2], ["enrol recovery of data again"])


@pytest.mark.usefixtures("on_disk")
def test_a_recovery_key_that_is_lost_everywhere_is_made_anew(of: Any) -> None:
    of.stored = {"header": "h"}
    of.keep("recovery.cms", b"")
    assert compared(of) == ("done", [], []), "the host still has it to give"
    of.drop("recovery.cms")
    assert compared(of) == ("keys", [2], ["enrol recovery of data again"])


@pytest.mark.usefixtures("on_disk")
def test_a_header_that_is_lost_everywhere_is_backed_up_anew(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "backup", lambda _path: b"header")
    monkeypatch.setattr(luks, "encrypt_to", lambda _certificate, secret: b"sealed " + secret)
    of.stored = {"recovery": "r"}
    assert compared(of, check=True) == ("done", [], ["back up the header of data"])
    assert not of.at("header.cms").exists()
    assert compared(of) == ("done", [], ["back up the header of data"])
    assert of.at("header.cms").read_bytes() == b"sealed header"
    assert of.record.header_sha256 == hashlib.sha256(b"sealed header").hexdigest()
    assert json.loads(of.at("json").read_text())["header_sha256"] == of.record.header_sha256
    assert compared(of) == ("done", [], [])


@pytest.mark.usefixtures("on_disk")
def test_another_escrow_key_is_for_a_person_until_it_is_rotated(
    of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "certificate_sha256", lambda _pem: "new")
    of.record.escrow_sha256 = "the-former-certificate"
    with pytest.raises(record.NeedsPerson, match=r"another escrow key \(certificate the-former-c\)"):
        compared(of)
    of.rotate = ["escrow"]
    assert compared(of) == ("keys", [2], ["enrol recovery of data again"])
    of.record.phase, of.record.retiring, of.rotate = "done", [], []
    of.record.escrow_sha256 = "new"
    assert compared(of) == ("done", [], [])


def test_an_interrupted_format_leaves_only_its_own_header(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "probed", Probes(blkid=(0, f"TYPE=crypto_LUKS\nUUID={UUID}", "")))
    phases.only_our_leftovers(of)
    monkeypatch.setattr(disks, "probed", Probes(blkid=(0, f"TYPE=crypto_LUKS\nUUID={OTHER}", "")))
    with pytest.raises(record.NeedsPerson, match=f"blank then and is not now:\nblkid: .*{OTHER}"):
        phases.only_our_leftovers(of)
    of.record.overridden = True
    phases.only_our_leftovers(of)
    of.record.overridden = False
    monkeypatch.setattr(disks, "probed", Probes())
    with of.path.open("r+b") as stream:
        stream.seek((16 << 20) - 1)
        stream.write(b"\1")
        stream.flush()
        phases.only_our_leftovers(of)
        stream.write(b"\1")
    with pytest.raises(record.NeedsPerson, match=f"byte {16 << 20} is not zero"):
        phases.only_our_leftovers(of)
