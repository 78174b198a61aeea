"""Revocation lists on a host: installed with the firewall's part, never replaced by an older one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from revoked_hosts import Estate

from llmkeep.pki import revoking

module = load("modules.host_revocations")
files = load("module_utils.config.files")


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    made = Estate(tmp_path, monkeypatch)
    made.certificate("train1")
    return made


@pytest.fixture
def reloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """systemctl is not called, but what would be is remembered."""
    called: list[str] = []
    monkeypatch.setattr(module, "must", lambda unit, verb: called.append(f"{verb} {unit}"))
    monkeypatch.setattr(module.atomic, "PENDING", tmp_path / "pending")
    return called


def published(estate: Estate) -> str:
    return estate.places.revocation_list.read_text() + estate.places.revoked_probe.read_text()


def wanted(estate: Estate, **hosts: str) -> dict[str, Any]:
    (estate.folder / "host").mkdir(exist_ok=True)
    return {
        "published": published(estate),
        "hosts": hosts,
        "spared": ["10.77.0.1"],
        "directory": str(estate.folder / "host"),
        "firewall": str(estate.folder / "host/refuse-input-revoked.nft"),
    }


def test_lists_and_probe_are_installed_once_and_services_reloaded(estate: Estate, reloads: list[str]) -> None:
    assert module.settle(wanted(estate), True)["changed"]
    assert not (estate.folder / "host/crl.pem").exists()
    assert module.settle(wanted(estate), False)["changed"]
    assert not module.settle(wanted(estate), False)["changed"]
    assert reloads == ["restart llmkeep-certificate.service"]
    assert (estate.folder / "host/crl.pem").read_text() == estate.places.revocation_list.read_text()
    assert (estate.folder / "host/revoked.pem").read_text() == estate.places.revoked_probe.read_text()
    assert (estate.folder / "host/revoked.pem").stat().st_mode & 0o777 == 0o600


def test_a_run_that_read_the_list_earlier_does_not_undo_a_revocation(
    estate: Estate, reloads: list[str]
) -> None:
    earlier = wanted(estate)
    estate.revoke("train1")
    module.settle(wanted(estate, llm1="10.77.0.12", train1="10.77.0.13"), False)
    assert not module.settle(earlier, False)["changed"]
    assert "# revoked: train1" in (estate.folder / "host/crl.pem").read_text()
    assert "10.77.0.13" in (estate.folder / "host/refuse-input-revoked.nft").read_text()
    assert "10.77.0.12" not in (estate.folder / "host/refuse-input-revoked.nft").read_text()
    assert len(reloads) == 1


@pytest.mark.usefixtures("reloads")
def test_the_firewall_takes_the_rules_and_loses_them_with_the_revocation(estate: Estate) -> None:
    estate.certificate("train2")
    estate.revoke("train1")
    estate.revoke("train2")
    module.settle(wanted(estate, train1="10.77.0.13", train2="fd00::13"), False)
    assert (estate.folder / "pending/nftables.service").exists()
    rules = estate.folder / "host/refuse-input-revoked.nft"
    chain = f'table inet t {{\n counter refused_in {{\n }}\n chain input {{\n include "{rules}"\n }}\n}}\n'
    checked = ["unshare", "--net", "nft", "--check", "--file", "-"]
    done = subprocess.run(checked, input=chain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("train1", "train2"):
        revoking.reinstate(estate.places, name, "found again", "ada")
    assert module.settle(wanted(estate, train1="10.77.0.13", train2="fd00::13"), False)["changed"]
    assert not rules.exists()


@pytest.mark.usefixtures("reloads")
def test_the_control_node_and_the_host_itself_are_never_shut_out(estate: Estate) -> None:
    estate.revoke("train1")
    assert module.settle(wanted(estate, train1="10.77.0.1"), False)["revoked"] == ["train1"]
    assert not (estate.folder / "host/refuse-input-revoked.nft").exists()


@pytest.mark.usefixtures("reloads")
def test_refuses_what_is_no_list_and_a_name_in_place_of_an_address(estate: Estate) -> None:
    with pytest.raises(module.Refused, match="llmkeep pki crl"):
        module.settle({**wanted(estate), "published": "cat: no such file"}, False)
    estate.revoke("train1")
    with pytest.raises(module.Refused, match="must be an address"):
        module.settle(wanted(estate, train1="train1"), False)
