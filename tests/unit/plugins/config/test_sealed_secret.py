"""sealed_secret with a stand-in for systemd-creds that keeps a record of how it was called."""

import base64
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

sealed_secret = load("modules.sealed_secret")
sealing = load("module_utils.config.sealing")

P_256 = ("-pkeyopt", "ec_paramgen_curve:P-256")
NEW_KEY = ("openssl", "genpkey", "-quiet", "-algorithm", "EC", *P_256)
SELF_SIGNED = (
    "openssl",
    "req",
    "-x509",
    "-newkey",
    "ec",
    *P_256,
    "-nodes",
    "-days",
    "2",
    "-subj",
    "/CN=llm1",
)
STAND_IN = """#!/bin/sh
echo "$@" >> "$0.calls"; env >> "$0.calls"
case "$1" in encrypt) printf 'sealed:'; base64 ;; decrypt) sed 's/^sealed://' | base64 -d ;; esac
"""


@pytest.fixture
def creds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/systemd-creds"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def params(name: str, **more: Any) -> dict[str, Any]:
    usual = {"name": name, "bytes": 16, "create": True, "ring": None, "units": []}
    return usual | {"for_certificate": None, "from_cms": None} | more


def made(path: Path, **more: Any) -> str:
    """The digest that the module tells of the secret, which it makes where there is none."""
    return str(sealed_secret.settle(params(path.name, **more), path, False)["sha256"])


@pytest.mark.usefixtures("creds")
def test_the_digest_is_that_of_the_sealed_text_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "store/name"
    digest = made(path, bytes=32)
    secret = sealing.unseal("name", path.read_bytes())
    assert len(secret) == 64
    assert hashlib.sha256(secret).hexdigest() == digest == made(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_secret_is_in_no_argument_and_no_environment(tmp_path: Path, creds: Path) -> None:
    path = tmp_path / "store/name"
    made(path)
    secret = sealing.unseal("name", path.read_bytes()).decode()
    assert secret not in Path(f"{creds}.calls").read_text()


def test_a_credential_that_does_not_open_is_left_and_the_way_out_is_said(tmp_path: Path, creds: Path) -> None:
    path = tmp_path / "name"
    path.write_bytes(b"sealed by a key that is gone")
    creds.write_text("#!/bin/sh\necho 'Failed to decrypt: wrong key' >&2\nexit 1\n")
    with pytest.raises(sealed_secret.Refused, match=r"wrong key.*remove the file and run again"):
        made(path)
    assert path.read_bytes() == b"sealed by a key that is gone"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Key and certificate of a host, of the kind that the role pki makes."""
    folder = tmp_path_factory.mktemp("host")
    key, certificate = folder / "host.key", folder / "host.pem"
    subprocess.run(
        [*SELF_SIGNED, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return {"key": str(key), "certificate": str(certificate)}


def hand_over(tmp_path: Path, host: dict[str, str], check: bool = False) -> dict[str, Any]:
    """Both calls; what the second one returned."""
    certificate = Path(host["certificate"]).read_text()
    sent = sealed_secret.settle(params("pin", for_certificate=certificate), tmp_path / "control/pin", False)
    result: dict[str, Any] = sealed_secret.settle(
        params("unit.pin", from_cms=sent["cms"], **host), tmp_path / "host/unit.pin", check
    )
    assert result["sha256"] == sent["sha256"]
    return result


@pytest.mark.usefixtures("creds")
def test_a_secret_is_handed_to_another_host_and_a_second_time_changes_nothing(
    tmp_path: Path, host: dict[str, str]
) -> None:
    assert hand_over(tmp_path, host, check=True)["changed"]
    assert not (tmp_path / "host/unit.pin").exists()
    assert hand_over(tmp_path, host)["changed"]
    assert not hand_over(tmp_path, host)["changed"]
    assert made(tmp_path / "host/unit.pin") == made(tmp_path / "control/pin")


@pytest.mark.usefixtures("creds")
def test_another_secret_of_the_sender_replaces_the_one_that_was_handed_over(
    tmp_path: Path, host: dict[str, str]
) -> None:
    hand_over(tmp_path, host)
    (tmp_path / "control/pin").unlink()
    assert hand_over(tmp_path, host)["changed"]
    assert not hand_over(tmp_path, host)["changed"]


def test_what_travels_and_what_is_called_does_not_hold_the_secret(
    tmp_path: Path, creds: Path, host: dict[str, str]
) -> None:
    hand_over(tmp_path, host)
    secret = sealing.unseal("pin", (tmp_path / "control/pin").read_bytes())
    cms = sealing.encrypted_to(Path(host["certificate"]).read_text(), secret)
    assert secret.decode() not in cms
    assert secret not in base64.b64decode("".join(cms.splitlines()[1:-1]))
    assert secret.decode() not in Path(f"{creds}.calls").read_text()


@pytest.mark.usefixtures("creds")
def test_what_was_encrypted_to_another_host_is_refused_and_nothing_is_sealed(
    tmp_path: Path, host: dict[str, str]
) -> None:
    other = tmp_path / "other.key"
    subprocess.run(
        [*NEW_KEY, "-out", other],
        check=True,
    )
    with pytest.raises(
        sealed_secret.Refused, match=r"(?s)cannot be decrypted with .*other.key.*run the role again"
    ):
        hand_over(tmp_path, {**host, "key": str(other)})
    assert not (tmp_path / "host/unit.pin").exists()


@pytest.mark.usefixtures("creds")
def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sealing.Failed, match="was not encrypted to the certificate of the other host"):
        sealed_secret.settle(params("pin", for_certificate="none"), tmp_path / "pin", False)


@pytest.mark.usefixtures("creds")
def test_a_secret_that_comes_from_elsewhere_is_not_made_up(tmp_path: Path) -> None:
    path = tmp_path / "llmkeep.hsm-pin"
    with pytest.raises(sealed_secret.Refused, match=r"does not exist.*seal the secret yourself"):
        sealed_secret.settle(params("llmkeep.hsm-pin", create=False), path, False)
    assert not path.exists()


def ring(path: Path, step: str) -> tuple[bool, dict[str, str]]:
    """Whether the step changed the ring, and its keys by their states."""
    changed = sealed_secret.settle(params(path.name, ring=step), path, False)["changed"]
    lines = sealing.unseal(path.name, path.read_bytes()).decode().splitlines()
    return changed, dict(line.split(" ") for line in lines)


@pytest.mark.usefixtures("creds")
def test_each_step_of_a_rotation_is_taken_once_and_the_new_key_is_accepted_before_it_issues(
    tmp_path: Path,
) -> None:
    path = tmp_path / "llmkeep.estate-keys"
    changed, first = ring(path, "kept")
    assert (changed, list(first)) == (True, ["current"])
    assert ring(path, "switched") == (False, first), "nothing was added"
    changed, added = ring(path, "added")
    assert (changed, added["current"], list(added)) == (True, first["current"], ["current", "next"])
    assert ring(path, "added") == ring(path, "kept") == (False, added), "the run before was interrupted"
    changed, switched = ring(path, "switched")
    assert (changed, switched) == (True, {"current": added["next"], "former": first["current"]})
    _, again = ring(path, "added")
    assert list(again) == ["current", "next", "former"]
    assert ring(path, "switched") == (True, {"current": again["next"], "former": switched["current"]}), (
        "the first is gone"
    )


@pytest.mark.usefixtures("creds")
def test_a_check_takes_no_step(tmp_path: Path) -> None:
    path = tmp_path / "llmkeep.estate-keys"
    _, before = ring(path, "kept")
    assert sealed_secret.settle(params(path.name, ring="added"), path, True)["changed"]
    assert ring(path, "kept") == (False, before)


@pytest.mark.usefixtures("creds")
def test_hosts_that_ask_at_once_are_handed_the_same_secret(tmp_path: Path) -> None:
    path = tmp_path / "store/llmkeep.estate-keys"
    with ThreadPoolExecutor(8) as threads:
        digests = list(threads.map(lambda _: made(path, ring="kept"), range(8)))
    assert len(set(digests)) == 1


@pytest.mark.usefixtures("creds")
def test_units_are_marked_when_the_secret_that_they_load_changes(
    tmp_path: Path, host: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed_secret.atomic, "PENDING", tmp_path / "pending")
    certificate = Path(host["certificate"]).read_text()
    sent = sealed_secret.settle(params("pin", for_certificate=certificate), tmp_path / "control/pin", False)
    units = ["llm-gateway@1.service", "llm-web.service"]
    wanted = params("unit.pin", from_cms=sent["cms"], units=units, **host)
    sealed_secret.settle(wanted, tmp_path / "host/unit.pin", False)
    assert sorted(each.name for each in (tmp_path / "pending").iterdir()) == units
    for each in (tmp_path / "pending").iterdir():
        each.unlink()
    sealed_secret.settle(wanted, tmp_path / "host/unit.pin", False)
    assert not list((tmp_path / "pending").iterdir())
