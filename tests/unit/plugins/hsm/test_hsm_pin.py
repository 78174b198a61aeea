"""hsm_pin with real SoftHSM: the PIN changed in both tokens, and a run that was killed between any two steps of it.

3 kills, and 3 pairs of them, or as many as STORM says, from the seed SEED. The kills are between SoftHSM's own writes: one in the
middle of them costs it the token, which is its fault alone.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from kill_points import KillPoints
from plugin_modules import load
from softhsm import PIN as OLD
from softhsm import SOFTHSM, Double, double, faulty, hsm, pkcs11

hsm_pin = load("modules.hsm_pin")
NEW = "fedcba98765432100123456789abcde"
TOKENS = ("llmkeep", "llmkeep-spare")
KILLS = int(os.environ.get("STORM", "3"))
SEED = int(os.environ.get("SEED", "5"))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    found = double(tmp_path, monkeypatch)
    found.make_tokens()
    found.key()
    found.seal("new-pin", NEW)
    return found


def rotation(lab: Double, module: str = SOFTHSM, which: str = "this one") -> Any:
    settings = hsm.Settings(module=module, tokens=list(TOKENS), label="", seconds=120)
    return hsm_pin.Rotation(
        settings, {"old": OLD.encode(), "new": NEW.encode()}, lab.folder / "hsm-pin.json", which
    )


def taken(lab: Double) -> dict[str, str]:
    """Which PIN each token takes, by hand."""
    found = {}
    for token in TOKENS:
        for pin in (OLD, NEW):
            lab.seal("user-pin", pin)
            try:
                lab.by_hand(lambda _session: None, token)
            except hsm.Fault:
                continue
            found[token] = pin
    return found


def test_both_tokens_take_the_new_pin_alone_and_keep_their_keys(lab: Double) -> None:
    assert rotation(lab).settle() == list(TOKENS)
    assert taken(lab) == dict.fromkeys(TOKENS, NEW)
    lab.seal("user-pin", NEW)
    assert [key["state"] for key in lab.key()["key_pairs"]] == ["present", "present"]
    assert rotation(lab).settle() == []
    said = (lab.folder / "hsm-pin.json").read_text()
    assert OLD not in said
    assert NEW not in said


def test_a_wrong_old_pin_is_shown_once_and_nothing_is_changed(
    lab: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    monkeypatch.setenv("FAULTY_HSM_LOGINS", str(tmp_path / "logins"))
    wrong = rotation(lab, faulty(tmp_path))
    wrong.pins["old"] = b"somebody changed it"
    with pytest.raises(hsm.Fault) as told:
        wrong.settle()
    assert told.value.kind == "pin_wrong"
    assert (tmp_path / "logins").read_text() == "login\n"
    with pytest.raises(hsm.Fault, match="CKF_USER_PIN_COUNT_LOW, so no login was tried"):
        rotation(lab).settle()
    lab.by_hand(lambda _session: None)  # with the right one
    assert rotation(lab).settle() == list(TOKENS)


@pytest.mark.parametrize(
    ("flag", "entry", "held_back"),
    [
        ("0x10000", {}, True),  # somebody else's wrong PIN
        ("0x10000", {"asked": ["new"]}, False),  # this rotation's own
        ("0x20000", {"refused": ["new"]}, True),
        ("0x10000", {"asked": ["new", "old"]}, True),
    ],
)
def test_a_token_that_counted_a_wrong_pin_is_shown_another_only_where_that_one_is_right(
    lab: Double, monkeypatch: pytest.MonkeyPatch, flag: str, entry: dict[str, list[str]], held_back: bool
) -> None:
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    monkeypatch.setenv("FAULTY_HSM_LOGINS", str(lab.folder / "logins"))
    monkeypatch.setenv("FAULTY_HSM_FLAGS", flag)
    begun = rotation(lab, faulty(lab.folder))
    begun.entries = {"llmkeep": hsm_pin.Entry(**entry)} if entry else {}
    if held_back:
        with pytest.raises(hsm.Fault) as told:
            begun.settle()
        assert told.value.kind == "pin_held_back"
        assert not (lab.folder / "logins").exists()
    else:
        assert begun.taken("llmkeep") == "old"
        assert (lab.folder / "logins").read_text() == "login\n"


def test_a_new_pin_that_a_token_cannot_take_is_refused_before_any_login(lab: Double) -> None:
    long = rotation(lab)
    long.pins["new"] = b"x" * 300
    with pytest.raises(
        hsm.Fault, match=r"takes PINs of 4 to 255 characters, and the new one has 300.*hsm_pin_bytes"
    ):
        long.settle()
    assert taken(lab) == dict.fromkeys(TOKENS, OLD)


def test_another_new_pin_is_not_mixed_with_one_whose_change_was_cut_short(lab: Double) -> None:
    begun = rotation(lab)
    begun.change("llmkeep")
    begun.entries["llmkeep-spare"] = hsm_pin.Entry()
    begun.keep()
    with pytest.raises(hsm.Fault, match="tells of a change to another new PIN"):
        rotation(lab, which="another one")
    assert rotation(lab).settle() == ["llmkeep-spare"]
    assert rotation(lab, which="the next rotation").entries == {}


# ---------------------------------------------------------------- killed
class Storm:
    """Rotations that are killed, and what the tokens counted meanwhile."""

    def __init__(self, lab: Double) -> None:
        self.lab, self.shown = lab, lab.folder / "shown"
        functions = [(hsm, "log_in"), (pkcs11.Session, "change_pin"), (hsm_pin.Rotation, "keep")]
        self.points = KillPoints(lab.folder / "points", functions)
        shutil.copytree(lab.folder / "tokens", lab.folder / "tokens.kept")

    def restore(self) -> None:
        shutil.rmtree(self.lab.folder / "tokens")
        shutil.copytree(self.lab.folder / "tokens.kept", self.lab.folder / "tokens")
        for path in (self.shown, self.lab.folder / "hsm-pin.json"):
            path.unlink(missing_ok=True)

    def work(self) -> None:
        real = pkcs11.Session.login

        def login(session: Any, pin: bytes) -> None:
            refused = True
            try:
                real(session, pin)
                refused = False
            finally:
                with self.shown.open("a") as stream:
                    stream.write("wrong\n" if refused else "right\n")
                self.points.step()  # counted, and the run does not know yet

        pkcs11.Session.login = login
        rotation(self.lab).settle()

    def run(self, at: int = 0) -> str:
        return self.points.run(self.work, at)

    def count(self) -> int:
        self.restore()
        return self.points.points(self.work)

    def most_wrong_in_a_row(self) -> int:
        """The tokens are asked one after the other, so a row is one token's, or shorter."""
        return max(map(len, self.shown.read_text().replace("\n", " ").replace("wrong ", "w").split("right ")))


def test_a_run_after_a_kill_at_any_step_ends_the_change_with_at_most_one_wrong_pin(lab: Double) -> None:
    storm, chance = Storm(lab), random.Random(SEED)  # noqa: S311
    steps = range(1, storm.count() + 1)
    for at in steps if len(steps) <= KILLS else chance.sample(steps, KILLS):
        storm.restore()
        assert storm.run(at) == "killed", at
        assert storm.run() == "done", at
        assert storm.most_wrong_in_a_row() <= 1, at
        record = json.loads((lab.folder / "hsm-pin.json").read_text())
        assert all(entry["changed"] for entry in record["tokens"].values()), at
    assert taken(lab) == dict.fromkeys(TOKENS, NEW)


def test_after_two_kills_the_change_ends_or_is_held_back_and_no_two_wrong_pins_are_shown(lab: Double) -> None:
    storm, chance = Storm(lab), random.Random(SEED)  # noqa: S311
    outcomes: dict[str, int] = {}
    steps = storm.count()
    for _ in range(KILLS):
        storm.restore()
        first, second = chance.randint(1, steps), chance.randint(1, steps)
        storm.run(first)
        storm.run(second)
        outcome = storm.run()
        outcomes[outcome[:60]] = outcomes.get(outcome[:60], 0) + 1
        assert outcome == "done" or "No further login is tried" in outcome, (first, second, outcome)
        assert storm.most_wrong_in_a_row() <= 1, (first, second)
    print(f"seed {SEED}: {KILLS} pairs of kills at {steps} steps ended as {outcomes}")
    assert outcomes["done"] > KILLS // 2
