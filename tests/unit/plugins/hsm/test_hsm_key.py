"""hsm_key with real SoftHSM, and with a fake around it for the faults that SoftHSM never has."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from plugin_modules import LINK, ROOT
from softhsm import PIN, SOFTHSM, Double, double, faulty, hsm, hsm_key, pkcs11


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    found = double(tmp_path, monkeypatch)
    found.make_tokens()
    return found


@pytest.fixture(scope="module")
def fake_module(tmp_path_factory: pytest.TempPathFactory) -> str:
    return faulty(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(fake_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets faults of the fake; returns its path."""
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    monkeypatch.setenv("FAULTY_HSM_LOGINS", str(tmp_path / "logins"))

    def with_faults(**faults: str) -> str:
        for name, value in faults.items():
            monkeypatch.setenv(f"FAULTY_HSM_{name.upper()}", value)
        return fake_module

    return with_faults


def logins(lab: Double) -> int:
    path = lab.folder / "logins"
    return len(path.read_text().splitlines()) if path.exists() else 0


def fault(lab: Double, **more: Any) -> Any:
    """The fault that hsm_key fails with."""
    with pytest.raises(hsm.Fault) as told:
        lab.key(**more)
    return told.value


def test_a_key_is_made_in_both_tokens_sensitive_never_extractable_and_local(lab: Double) -> None:
    result = lab.key()
    assert result["changed"]
    assert [key["state"] for key in result["key_pairs"]] == ["made", "made"]
    for key in result["key_pairs"]:
        assert key["type"] == "ec"
        assert all(
            key[name] for name in ("sensitive", "always_sensitive", "never_extractable", "local", "usable")
        )
        assert key["double"]
    assert result["key_pairs"][0]["public_sha256"] != result["key_pairs"][1]["public_sha256"]
    assert result["key_pairs"][1]["uri"] == "pkcs11:token=llmkeep-spare;object=llm1;type=public"


def test_the_private_half_cannot_be_read(lab: Double) -> None:
    lab.key()

    def secret(session: Any) -> str:
        (key,) = session.find({pkcs11.CLASS: pkcs11.PRIVATE_KEY, pkcs11.LABEL: b"llm1"})
        try:
            return str(session.read(key, pkcs11.VALUE).hex())
        except pkcs11.Error as refused:
            return str(refused)

    assert lab.by_hand(secret).startswith("C_GetAttributeValue returned")


def test_a_second_run_changes_nothing(lab: Double) -> None:
    first, second = lab.key(), lab.key()
    assert not second["changed"]
    assert [key["public_sha256"] for key in second["key_pairs"]] == [
        key["public_sha256"] for key in first["key_pairs"]
    ]


def test_check_mode_says_what_it_would_make_and_makes_nothing(lab: Double) -> None:
    result = lab.key(check=True)
    assert (result["changed"], result["missing"]) == (True, ["llmkeep", "llmkeep-spare"])
    assert lab.key(state="probed")["missing"] == ["llmkeep", "llmkeep-spare"]
    lab.key()
    assert not lab.key(check=True)["changed"]


def test_probing_makes_nothing(lab: Double) -> None:
    result = lab.key(state="probed")
    assert (result["changed"], result["missing"]) == (False, ["llmkeep", "llmkeep-spare"])


def test_an_rsa_key_is_a_finding(lab: Double) -> None:
    result = lab.key(type="rsa", label="old")
    assert [key["type"] for key in result["key_pairs"]] == ["rsa", "rsa"]
    assert "PKCS#1 v1.5" in result["findings"][0]
    assert fault(lab, label="old", record=None).kind == "key_weak"


def test_a_wrong_pin_is_tried_exactly_once(lab: Double, fake: Any) -> None:
    lab.seal("user-pin", "wrong-pin-of-somebody")
    told = fault(lab, module=fake())
    assert (told.kind, logins(lab)) == ("pin_wrong", 1)
    assert "tried once" in str(told)
    assert "wrong-pin-of-somebody" not in str(told)
    again = fault(lab, module=fake())
    assert (again.kind, logins(lab)) == ("pin_wrong", 1)
    assert "not tried again until another one is sealed" in str(again)
    lab.seal("user-pin", "another-wrong-pin")
    # It is looked at again; SoftHSM warns after one wrong PIN.
    assert (fault(lab, module=fake()).kind, logins(lab)) == ("pin_held_back", 1)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("0x10000", "CKF_USER_PIN_COUNT_LOW"),
        ("0x20000", "CKF_USER_PIN_FINAL_TRY"),
        ("0x40000", "CKF_USER_PIN_LOCKED"),
    ],
)
def test_a_token_that_a_login_might_lock_is_not_logged_in_to(
    lab: Double, fake: Any, flag: str, name: str
) -> None:
    told = fault(lab, module=fake(flags=flag))
    assert (told.kind, logins(lab)) == ("pin_held_back", 0)
    assert name in str(told)


def test_a_slow_hsm_is_waited_for_no_longer_than_said(lab: Double, fake: Any) -> None:
    begun = time.monotonic()
    told = fault(lab, module=fake(slow="30"), seconds=1)
    assert time.monotonic() - begun < 20
    assert told.kind == "slow"
    assert "asked to log in to the token llmkeep" in str(told)
    assert logins(lab) == 1


def test_a_module_that_crashes_takes_only_its_own_process_with_it(lab: Double, fake: Any) -> None:
    told = fault(lab, module=fake(crash="1"))
    assert told.kind == "absent"
    assert "ended its process" in str(told)


def test_an_hsm_that_goes_away_in_the_middle_is_absent(lab: Double, fake: Any) -> None:
    told = fault(lab, module=fake(gone="1"))
    assert told.kind == "absent"
    assert "CKR_DEVICE_REMOVED" in str(told)


def test_a_module_that_is_not_there_is_told(lab: Double) -> None:
    told = fault(lab, module="/usr/lib/vendor/none.so")
    assert told.kind == "absent"
    assert "correct hsm_module" in str(told)


def test_a_way_that_finds_the_key_and_does_not_open_is_refused(lab: Double, fake: Any) -> None:
    lab.key()
    told = fault(lab, module=fake(no_derive="0x71"))
    assert told.kind == "does_not_open"
    assert "CKR_MECHANISM_PARAM_INVALID" in str(told)
    assert "enrolled and never be opened" in str(told)


def test_a_way_that_answers_with_another_secret_is_refused(lab: Double, fake: Any) -> None:
    lab.key()
    told = fault(lab, module=fake(wrong="1"))
    assert told.kind == "does_not_open"
    assert "another secret" in str(told)


def test_a_token_that_is_not_there_is_told_with_those_that_are(lab: Double) -> None:
    told = fault(lab, tokens=["llmkeep", "elsewhere"])
    assert told.kind == "token_missing"
    assert "no token elsewhere; it has (no label), llmkeep, llmkeep-spare" in str(told)


def test_two_tokens_of_one_label_are_refused_before_any_login(lab: Double, fake: Any) -> None:
    lab.make_tokens(tokens=["twin"])
    first = lab.folder / "first"
    shutil.copytree(lab.folder / "tokens", first)
    shutil.rmtree(lab.folder / "tokens")
    (lab.folder / "tokens").mkdir()
    lab.make_tokens(tokens=["twin"], record=str(lab.folder / "other.json"))
    shutil.copytree(first, lab.folder / "tokens", dirs_exist_ok=True)
    told = fault(lab, module=fake(), tokens=["llmkeep", "twin"])
    assert (told.kind, logins(lab)) == ("two_tokens", 0)


def test_a_key_that_was_deleted_is_told_and_no_new_one_is_made(lab: Double) -> None:
    lab.key()
    lab.key(label="llm2", record=None)

    def delete(session: Any) -> None:
        for key in session.find({pkcs11.LABEL: b"llm1"}):
            session.destroy(key)

    lab.by_hand(delete, token="llmkeep-spare")
    for state in "probed", "present":
        told = fault(lab, state=state)
        assert told.kind == "key_missing"
        assert "gone from the token llmkeep-spare" in str(told)


def test_half_a_key_is_told(lab: Double) -> None:
    lab.key()
    lab.by_hand(lambda session: session.destroy(session.find({pkcs11.CLASS: pkcs11.PUBLIC_KEY})[0]))
    told = fault(lab)
    assert told.kind == "key_missing"
    assert "the public half of the key llm1 is missing" in str(told)


def test_a_key_in_the_place_of_another_is_told(lab: Double) -> None:
    lab.key()
    lab.by_hand(lambda session: [session.destroy(key) for key in session.find({pkcs11.LABEL: b"llm1"})])
    lab.key(record=None)
    told = fault(lab)
    assert told.kind == "key_missing"
    assert "differs from the previous one" in str(told)


def test_a_token_that_was_made_anew_under_its_serial_is_told_by_its_emptiness(lab: Double) -> None:
    lab.key()
    lab.reinitialise("llmkeep-spare")
    told = fault(lab)
    assert told.kind == "token_reinitialised"
    assert "the token llmkeep-spare" in str(told)
    assert fault(lab).kind == "token_reinitialised"  # still: no key was made in it


def test_a_token_with_another_serial_is_told_and_not_logged_in_to(lab: Double, fake: Any) -> None:
    lab.key()
    shutil.rmtree(lab.folder / "tokens")
    (lab.folder / "tokens").mkdir()
    lab.make_tokens(record=str(lab.folder / "other.json"))
    told = fault(lab, module=fake())
    assert (told.kind, logins(lab)) == ("token_reinitialised", 0)


def test_two_keys_of_one_label_are_refused(lab: Double) -> None:
    lab.key()
    settings = hsm.Settings(module=SOFTHSM, tokens=["llmkeep"], label="llm1")
    lab.by_hand(lambda session: hsm.generate(session, settings))
    told = fault(lab)
    assert told.kind == "two_keys"
    assert "2 private and 2 public keys called llm1" in str(told)


def test_a_key_that_can_be_read_out_is_refused(lab: Double) -> None:
    name = {pkcs11.TOKEN: True, pkcs11.LABEL: b"weak", pkcs11.ID: b"1"}
    lab.by_hand(
        lambda session: session.generate(
            pkcs11.EC_KEY_PAIR_GEN,
            {**name, pkcs11.PRIVATE: False, pkcs11.EC_PARAMS: pkcs11.P_384},
            {
                **name,
                pkcs11.PRIVATE: True,
                pkcs11.SENSITIVE: False,
                pkcs11.EXTRACTABLE: True,
                pkcs11.DERIVE: True,
            },
        )
    )
    told = fault(lab, label="weak", tokens=["llmkeep"])
    assert told.kind == "key_weak"
    assert "is not sensitive, not always_sensitive, not never_extractable" in str(told)


@pytest.mark.parametrize("pin", ["", "0123456789abcdef\n"])
def test_a_pin_that_cannot_be_right_is_not_tried(lab: Double, fake: Any, pin: str) -> None:
    lab.seal("user-pin", pin)
    told = fault(lab, module=fake())
    assert (told.kind, logins(lab)) == ("no_pin", 0)


def test_a_record_that_cannot_be_read_stops_before_any_login(lab: Double, fake: Any) -> None:
    (lab.folder / "hsm.json").write_text("{")
    assert (fault(lab, module=fake()).kind, logins(lab)) == ("token_reinitialised", 0)


def test_every_fault_has_an_exit_code_of_its_own() -> None:
    assert len(set(hsm.EXIT.values())) == len(hsm.EXIT)
    assert not {0, 1, 2} & set(hsm.EXIT.values())


def test_every_fault_has_a_row_in_the_runbooks() -> None:
    text = (ROOT / "docs/operate/hsm.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) `(\w+)` \|", text, re.MULTILINE))
    assert {name: int(code) for code, name in rows.items()} == hsm.EXIT


def test_the_program_tells_what_opens_and_exits_with_the_faults_code(lab: Double) -> None:
    lab.key()
    settings = {"module": SOFTHSM, "tokens": ["llmkeep"], "label": "llm1", "pin_name": "user-pin"}
    settings |= {"pin": str(lab.folder / "user-pin"), "record": str(lab.folder / "hsm.json")}

    def program() -> subprocess.CompletedProcess[str]:
        (lab.folder / "settings.json").write_text(json.dumps(settings))
        script = "import sys; from pathlib import Path; from ansible_collections.llmkeep.estate.plugins."
        script += "module_utils.hsm import token_keys as hsm; hsm.SETTINGS = Path(sys.argv[1]); sys.exit(hsm.main())"
        return subprocess.run(
            [sys.executable, "-c", script, str(lab.folder / "settings.json")],
            env={**os.environ, "PYTHONPATH": str(LINK.parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )

    done = program()
    assert (done.returncode, json.loads(done.stdout)["opens"]) == (0, ["llmkeep"])
    settings["tokens"] = ["none"]
    done = program()
    assert (done.returncode, json.loads(done.stdout)["fault"]) == (hsm.EXIT["token_missing"], "token_missing")


def absent(lab: Double, **more: Any) -> dict[str, Any]:
    """Arguments that destroy the key llm1 in both tokens."""
    tokens = {"module": SOFTHSM, "tokens": ["llmkeep", "llmkeep-spare"], "pin": str(lab.folder / "user-pin")}
    return {"state": "absent", **tokens, "labels": ["llm1"], "in_use": [], **more}


def test_an_absent_key_is_gone_from_both_tokens_with_one_login_each(
    lab: Double, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.key(record=None)
    lab.key(label="llm1-2", record=None)
    given = absent(lab, module=fake(), labels=["llm1", "llm1-2"], in_use=["llm2"])
    four = {"llmkeep": 4, "llmkeep-spare": 4}
    told = called(hsm_key, {**given, "_ansible_check_mode": True}, capsys)
    assert (told["changed"], told["destroyed"]) == (True, four)
    assert lab.key(state="probed", record=None)["missing"] == []
    before = logins(lab)
    told = called(hsm_key, given, capsys)
    assert (told["changed"], told["destroyed"]) == (True, four)
    assert logins(lab) - before == 2
    assert lab.key(state="probed", record=None)["missing"] == ["llmkeep", "llmkeep-spare"]
    assert not called(hsm_key, given, capsys)["changed"]


def test_a_key_in_use_is_not_destroyed(lab: Double, capsys: pytest.CaptureFixture[str]) -> None:
    lab.key()
    told = called(hsm_key, absent(lab, in_use=["llm1", "llm2"]), capsys)
    assert told["failed"]
    assert "llm1 is a key that volumes are enrolled with; nothing was destroyed" in told["msg"]
    assert lab.key(state="probed")["missing"] == []


@pytest.mark.parametrize(
    "wrong", [{"in_use": None}, {"labels": None}, {"state": "present"}, {"label": "llm1"}]
)
def test_each_state_has_labels_of_its_own(
    lab: Double, wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lab.key()
    given = {name: value for name, value in absent(lab, **wrong).items() if value is not None}
    assert called(hsm_key, given, capsys)["failed"]
    assert lab.key(state="probed")["missing"] == []


def test_a_fault_while_destroying_names_the_labels(lab: Double, capsys: pytest.CaptureFixture[str]) -> None:
    told = called(hsm_key, absent(lab, tokens=["none"]), capsys)
    assert (told["fault"], told["exit"]) == ("token_missing", hsm.EXIT["token_missing"])
    assert told["msg"].startswith("llm1: ")


def of_host(lab: Double, host: str) -> dict[str, Any]:
    """Token, PIN and key of a host that shares none of them."""
    return {
        "tokens": [f"llmkeep-{host}"],
        "pin": str(lab.seal(f"pin-{host}", f"{PIN}{host}")),
        "label": host,
        "record": None,
    }


def test_a_host_s_pin_opens_no_key_of_a_host_with_a_token_of_its_own(lab: Double) -> None:
    for host in ("llm1", "llm2"):
        given = of_host(lab, host)
        lab.make_tokens(tokens=given["tokens"], user_pin=given["pin"])
        assert [key["token"] for key in lab.key(**given)["key_pairs"]] == given["tokens"]
    thief = {**of_host(lab, "llm2"), "pin": of_host(lab, "llm1")["pin"]}
    assert fault(lab, **thief, state="probed").kind == "pin_wrong"


def test_hosts_that_share_a_token_open_each_other_s_keys(lab: Double) -> None:
    """What docs/operate/storage.md says of the default."""
    lab.key(label="llm1", record=None)
    lab.key(label="llm2", record=None)
    assert lab.key(label="llm2", state="probed", record=None)["missing"] == []
