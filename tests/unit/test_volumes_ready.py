"""`llmkeep-volumes ready`: what asks the HSM before systemd-cryptsetup does, with a stand-in for llmkeep-hsm."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "roles/luks/files/llmkeep-volumes"


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
    module.SETTINGS.update({"volumes": [], "pin": str(tmp_path / "pin"), "state": str(tmp_path)})
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


def test_a_wrong_pin_is_shown_once_until_another_one_is_sealed(
    volumes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hsm(volumes, tmp_path, 16)
    assert [volumes.ready("data") for _ in range(3)] == [16, 16, 16]
    assert calls(path) == 1
    assert "not shown again until another one is sealed" in capsys.readouterr().out
    (tmp_path / "pin").write_text("sealed anew")
    assert volumes.ready("data") == 16
    assert calls(path) == 2


@pytest.mark.parametrize("code", [10, 11, 15, 21])
def test_an_hsm_that_is_away_or_a_pin_that_is_held_back_is_asked_again_and_nothing_is_tried(
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
    path = hsm(volumes, tmp_path, 17)
    assert [volumes.ready("data"), volumes.ready("data")] == [17, 16]
    assert (calls(path), calls(tried)) == (1, 1)
