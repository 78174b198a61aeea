"""A host's key and certificate: made there, renewed for a reason, taken only when all of it fits."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_modules import HELPERS, load

from llmkeep.pki import authority as pki
from llmkeep.places import Places

host_certificate = load("modules.host_certificate")
NAMES = ["llm1.estate.internal", "10.77.0.12", "fd00::12"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A control node whose sealing is left out."""
    found = Places(tmp_path_factory.mktemp("control"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "seal", lambda secret, _: secret)
        patch.setattr(pki, "encrypt_to", lambda *_: b"")
        pki.init(found, "estate.internal", Path("escrow.pem"), list(pki.NETWORKS))
    return found


@pytest.fixture(autouse=True)
def reloads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """systemctl is not called, but what would be is remembered."""
    called: list[list[str]] = []
    really = subprocess.run

    def run(argv: list[str], **more: Any) -> Any:
        if argv[0] != "systemctl":
            return really(argv, **more)
        called.append(argv)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(pki, "unseal", lambda sealed, _: sealed)
    return called


@pytest.fixture
def wanted(places: Places, tmp_path: Path) -> dict[str, Any]:
    """The module's parameters."""
    chain = places.issuing_certificate.read_text() + places.root_certificate.read_text()
    return {
        "names": NAMES,
        "chain": chain,
        "certificate": None,
        "directory": str(tmp_path / "pki"),
        "group": "root",
        "name": "host",
        "public_key": None,
        "key": None,
        "openssl": ["openssl"],
        "renew_days": 30,
        "reload_unit": "llmkeep-certificate.service",
    }


def signed(places: Places, wanted: dict[str, Any], names: list[str] = NAMES, days: int = 90) -> str:
    request = host_certificate.request(Path(wanted["directory"]) / "host.key", names)
    return pki.sign(places, request.encode(), names, "llm1", days).decode()


@pytest.fixture
def host(places: Places, wanted: dict[str, Any]) -> Path:
    """A host that has its certificate."""
    host_certificate.settle(wanted, False)
    host_certificate.settle({**wanted, "certificate": signed(places, wanted)}, False)
    return Path(wanted["directory"])


def test_a_fresh_host_makes_its_key_and_asks(wanted: dict[str, Any]) -> None:
    result = host_certificate.settle(wanted, False)
    folder = Path(wanted["directory"])
    assert (result["changed"], result["reasons"]) == (True, ["there is no certificate"])
    assert "BEGIN CERTIFICATE REQUEST" in result["request"]
    assert "PRIVATE" not in str(result)
    assert (folder / "host.key").stat().st_mode & 0o777 == 0o640
    assert not (folder / "host.pem").exists()


def test_check_mode_on_a_fresh_host_changes_nothing(wanted: dict[str, Any]) -> None:
    assert host_certificate.settle(wanted, True)["changed"]
    assert not Path(wanted["directory"]).exists()


def test_a_host_that_has_its_certificate_has_no_reason(host: Path, wanted: dict[str, Any]) -> None:
    before = {path: path.read_bytes() for path in host.iterdir()}
    for check in (True, False):
        result = host_certificate.settle(wanted, check)
        assert (result["changed"], result["reasons"], result["days_left"]) == (False, [], 89)
    assert before == {path: path.read_bytes() for path in host.iterdir()}


def test_a_new_certificate_is_taken_in_by_what_serves_it(host: Path, reloads: list[list[str]]) -> None:
    assert (host / "host.pem").exists()
    assert reloads == [["systemctl", "restart", "llmkeep-certificate.service"]]


def test_other_names_are_a_reason(host: Path, wanted: dict[str, Any]) -> None:
    assert host.exists()
    (reason,) = host_certificate.settle({**wanted, "names": NAMES[:2]}, False)["reasons"]
    assert reason.startswith("it names 10.77.0.12, fd00::12, llm1.estate.internal, not ")


def test_few_days_left_are_a_reason(host: Path, places: Places, wanted: dict[str, Any]) -> None:
    (host / "host.pem").write_text(signed(places, wanted, days=20))
    (reason,) = host_certificate.settle(wanted, False)["reasons"]
    assert reason.startswith("it ends in 19 days")


def test_another_key_is_a_reason(host: Path, wanted: dict[str, Any]) -> None:
    (host / "host.key").unlink()
    assert host_certificate.settle(wanted, False)["reasons"] == ["it was made for another key"]


def test_a_torn_certificate_is_a_reason(host: Path, wanted: dict[str, Any]) -> None:
    (host / "host.pem").write_text((host / "host.pem").read_text()[:300])
    (reason,) = host_certificate.settle(wanted, False)["reasons"]
    assert reason.startswith("it is not readable")


def test_another_issuing_certificate_is_a_reason(host: Path, wanted: dict[str, Any], tmp_path: Path) -> None:
    assert host.exists()
    other = Places(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "seal", lambda secret, _: secret)
        patch.setattr(pki, "encrypt_to", lambda *_: b"")
        pki.init(other, "estate.internal", Path("escrow.pem"), list(pki.NETWORKS))
    chain = other.issuing_certificate.read_text() + other.root_certificate.read_text()
    result = host_certificate.settle({**wanted, "chain": chain}, False)
    assert any("present issuing certificate" in reason for reason in result["reasons"])


@pytest.mark.parametrize("names", [NAMES[:2], ["llm2.estate.internal"]])
def test_a_certificate_for_other_names_is_not_taken(
    host: Path, places: Places, wanted: dict[str, Any], names: list[str]
) -> None:
    before = (host / "host.pem").read_bytes()
    with pytest.raises(host_certificate.Refused, match="The one on disk stays"):
        host_certificate.settle({**wanted, "certificate": signed(places, wanted, names)}, False)
    assert (host / "host.pem").read_bytes() == before
    assert sorted(path.name for path in host.iterdir()) == ["host.key", "host.pem", "root.pem"]


@pytest.mark.parametrize("name", ["*.estate.internal", "a,DNS:b", "", "a b"])
def test_names_that_would_say_more_to_openssl_are_refused(wanted: dict[str, Any], name: str) -> None:
    with pytest.raises(host_certificate.Refused, match="no wildcards"):
        host_certificate.settle({**wanted, "names": [name]}, False)


def test_a_chain_that_is_none_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(host_certificate.Refused, match="llmkeep pki status"):
        host_certificate.settle({**wanted, "chain": ""}, False)


STEP = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from plugin_modules import HELPERS, load
load("modules.host_certificate").settle(json.loads(sys.argv[2]), False)
"""


def test_a_power_cut_at_any_moment_leaves_a_whole_key_or_none(places: Places, wanted: dict[str, Any]) -> None:
    """A sample of the storm: the module is killed at moments spread over its run, and then goes on."""
    folder = Path(wanted["directory"])
    path = [str(HELPERS), *sys.path]
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", STEP, json.dumps(path), json.dumps(wanted)], check=True)
    whole = time.monotonic() - started
    for part in range(12):
        (folder / "host.key").unlink(missing_ok=True)
        step = subprocess.Popen([sys.executable, "-c", STEP, json.dumps(path), json.dumps(wanted)])
        time.sleep(whole * (0.4 + part * 0.05))
        step.kill()
        step.wait()
        if (folder / "host.key").exists():
            host_certificate.openssl("pkey", "-in", str(folder / "host.key"), "-noout", "-check")
        assert host_certificate.settle(wanted, False)["request"]
        assert sorted(entry.name for entry in folder.iterdir()) == ["host.key", "root.pem"]
    host_certificate.settle({**wanted, "certificate": signed(places, wanted)}, False)
    assert host_certificate.settle(wanted, False)["reasons"] == []
