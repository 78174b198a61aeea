"""softhsm_tokens with real SoftHSM: tokens are made once, and never again."""

import json
import shutil
from pathlib import Path

import pytest
from softhsm import SOFTHSM, Double, double, hsm, pkcs11


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    return double(tmp_path, monkeypatch)


def test_tokens_are_made_once(lab: Double) -> None:
    first = lab.make_tokens()
    assert first["made"] == ["llmkeep", "llmkeep-spare"]
    second = lab.make_tokens()
    assert not second["changed"]
    assert second["serials"] == first["serials"]


def test_check_mode_makes_none(lab: Double) -> None:
    assert lab.make_tokens(check=True)["changed"]
    assert not list((lab.folder / "tokens").iterdir())
    assert not (lab.folder / "tokens.json").exists()


def test_a_token_that_an_interrupted_run_left_without_its_pin_gets_it(lab: Double) -> None:
    officer = (lab.folder / "so-pin").read_bytes()
    hsm.bounded(lambda _step: pkcs11.Module(SOFTHSM).initialise(0, officer, "llmkeep"), 20)
    (folder,) = (lab.folder / "tokens").iterdir()
    assert lab.make_tokens()["made"] == ["llmkeep", "llmkeep-spare"]
    assert folder.exists()
    assert lab.by_hand(lambda _session: True)


def test_a_token_that_is_gone_is_told_and_not_made_anew(lab: Double) -> None:
    lab.make_tokens()
    for folder in (lab.folder / "tokens").iterdir():
        # What a killed login leaves (roles/softhsm): the file is there and empty.
        (folder / "token.object").write_bytes(b"")
    with pytest.raises(hsm.Fault, match=r"the token llmkeep .* is gone.*No new one is made") as told:
        lab.make_tokens()
    assert told.value.kind == "token_missing"


def test_a_token_that_somebody_made_anew_is_told(lab: Double) -> None:
    lab.make_tokens()
    shutil.rmtree(lab.folder / "tokens")
    (lab.folder / "tokens").mkdir()
    lab.make_tokens(record=str(lab.folder / "other.json"))
    with pytest.raises(hsm.Fault, match="was initialized again") as told:
        lab.make_tokens()
    assert told.value.kind == "token_reinitialised"


def test_two_tokens_of_one_label_are_refused_and_neither_is_touched(lab: Double) -> None:
    lab.make_tokens()
    record = json.loads((lab.folder / "tokens.json").read_text())
    second = lab.folder / "second"
    shutil.move(lab.folder / "tokens", second)
    (lab.folder / "tokens").mkdir()
    (lab.folder / "tokens.json").unlink()
    lab.make_tokens()
    for folder in second.iterdir():
        shutil.move(folder, lab.folder / "tokens" / folder.name)
    with pytest.raises(hsm.Fault, match=r"SoftHSM has 2 tokens llmkeep \(serials") as told:
        lab.make_tokens()
    assert told.value.kind == "two_tokens"
    assert record["llmkeep"] in str(told.value)


def test_another_pin_than_the_tokens_own_is_told(lab: Double) -> None:
    lab.make_tokens()
    lab.seal("user-pin", "another-pin")
    with pytest.raises(hsm.Fault, match="rejects the PIN") as told:
        lab.make_tokens()
    assert told.value.kind == "pin_wrong"
