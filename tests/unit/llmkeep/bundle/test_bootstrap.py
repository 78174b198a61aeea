"""bootstrap refuses what `llmkeep bundle verify` refuses, with the same exit code, before it runs anything.

The script runs for real, with its folders moved to a temporary one. Where it would go on to install packages
it is stopped: the lab's tests see the rest.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small_bundle
from bootstrapped import Machine
from softhsm import PIN, SOFTHSM, double

from llmkeep.bundle import manifest, signing
from llmkeep.bundle.token_key import Token

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bootstrap needs root")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_bundle.signing_keys(tmp_path_factory.mktemp("keys")))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_bundle.signing_keys(tmp_path_factory.mktemp("foreign")))


@pytest.fixture
def machine(tmp_path: Path, keys: Path) -> Machine:
    (tmp_path / "root").mkdir()
    return Machine(tmp_path / "root", small_bundle.write(tmp_path / "stick", keys))


def test_puts_a_good_bundle_in_place_once(machine: Machine) -> None:
    (machine.stick / "lost+found").mkdir()  # as on the ext4 of a stick
    first = machine.bootstrap()
    assert (first.returncode, first.stderr) == (0, "")
    assert f"escrow certificate: sha256 {hashlib.sha256(b'a certificate').hexdigest()}" in first.stdout
    assert machine.accepted == ["7", "current"]
    assert (machine.root / "var/lib/llmkeep/serial").read_text() == "7\n"
    second = machine.bootstrap()
    assert second.returncode == 0
    assert "here already and whole" in second.stdout


def test_takes_a_bundle_that_was_signed_in_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hsm = double(tmp_path, monkeypatch)
    hsm.make_tokens(tokens=["bundle"])
    signing.init_in_token(tmp_path / "keys", Token(SOFTHSM, "bundle", "llmkeep bundle"), PIN)
    (tmp_path / "keys/pin").write_text(PIN)
    (tmp_path / "keys/pin").chmod(0o600)
    (tmp_path / "root").mkdir()
    machine = Machine(tmp_path / "root", small_bundle.write(tmp_path / "stick", tmp_path / "keys"))
    done = machine.bootstrap()
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.accepted == ["7", "current"]


def test_copies_again_what_was_damaged_on_the_control_node(machine: Machine) -> None:
    machine.bootstrap()
    (machine.root / "srv/llmkeep/bundle/7/models/small/weights").write_text("cut")
    assert machine.bootstrap().returncode == 0
    assert len((machine.root / "srv/llmkeep/bundle/7/models/small/weights").read_bytes()) == 5000


@pytest.mark.parametrize("left", [".incoming", "current.new"])
def test_goes_on_after_a_power_loss(left: str, machine: Machine) -> None:
    store = machine.root / "srv/llmkeep/bundle"
    store.mkdir(parents=True)
    if left == ".incoming":
        (store / left / "half").mkdir(parents=True)
    else:
        (store / left).symlink_to("6")
    assert machine.bootstrap().returncode == 0
    assert machine.accepted == ["7", "current"]


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.05, 0.08, 0.12, 0.2])
def test_goes_on_after_it_was_killed_anywhere(seconds: float, machine: Machine) -> None:
    started = subprocess.Popen(
        ["sh", str(machine.script())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    again = machine.bootstrap()
    assert (again.returncode, again.stderr) == (0, "")
    assert machine.accepted == ["7", "current"]


@pytest.mark.parametrize("damage", small_bundle.DAMAGE)
def test_refuses_a_stick_with(damage: str, machine: Machine, foreign: Path) -> None:
    do, code, words = small_bundle.DAMAGE[damage]
    do(machine.stick, foreign)
    run = machine.bootstrap()
    assert run.returncode == code, run.stderr
    assert "refused" in run.stderr
    assert words in run.stderr
    assert machine.accepted == []
    assert not (machine.root / "var/lib/llmkeep/serial").exists()


def test_refuses_an_older_serial_and_keeps_the_newer_bundle(machine: Machine, keys: Path) -> None:
    machine.bootstrap()
    small_bundle.sign(machine.stick, keys, 6, 30)
    run = machine.bootstrap()
    assert run.returncode == manifest.REPLAYED
    assert "serial 6 is older than 7" in run.stderr
    assert machine.accepted == ["7", "current"]


@pytest.mark.parametrize("kind", ["image", "release", ""])
def test_refuses_a_manifest_that_the_same_key_signed_as_something_else(
    kind: str, machine: Machine, keys: Path
) -> None:
    small_bundle.sign(machine.stick, keys, 7, 30, kind)
    run = machine.bootstrap()
    assert run.returncode == manifest.UNSIGNED
    assert f"is signed as '{kind}', but 'bundle' is needed" in run.stderr
    assert machine.accepted == []


def test_refuses_an_expired_bundle(machine: Machine, keys: Path) -> None:
    small_bundle.sign(machine.stick, keys, 8, -1)
    run = machine.bootstrap()
    assert run.returncode == manifest.EXPIRED
    assert "expired at" in run.stderr


@pytest.mark.parametrize(("serial", "days"), [(6, 30), (9, -1)], ids=["older", "expired"])
def test_refuses_a_stick_that_answers_differently_the_second_time(
    serial: int, days: int, machine: Machine, keys: Path, tmp_path: Path
) -> None:
    machine.bootstrap()
    (machine.stick / "models/small/weights").write_bytes(b"of the new bundle")
    small_bundle.sign(machine.stick, keys, 8, 30)
    second = tmp_path / "second"
    shutil.copytree(machine.stick, second)
    small_bundle.sign(second, keys, serial, days)
    (second / "models/small/weights").write_bytes(b"of the other bundle")
    small_bundle.sign(second, keys, serial, days)
    machine.meanwhile = f"cp -R {second}/. {machine.stick}"
    run = machine.bootstrap()
    assert run.returncode == manifest.DAMAGED
    assert machine.accepted == ["7", "current"]


def test_keeps_the_bundle_before_and_no_older_one(machine: Machine, keys: Path) -> None:
    for serial in (7, 8, 12):
        small_bundle.sign(machine.stick, keys, serial, 30)
        assert machine.bootstrap().returncode == 0
    assert machine.accepted == ["12", "8", "current"]
    assert (machine.root / "srv/llmkeep/bundle/current").readlink() == Path("12")
