"""What role ipsec makes of an inventory, and that its rules let nothing pass in clear: real packets in real namespaces."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import ROOT
from rendered_role import hardened, rendered

HOSTS = {"train1.estate.internal": "10.0.0.21", "train2.estate.internal": "10.0.0.22"}
GIVEN = {"llm_training_hosts": ["train1", "train2"]}
CLEAR = {**GIVEN, "llm_training_encrypt": False}
PORTS = "{ 29400, 32768-60999 }"
PROBE = ROOT / "roles/ipsec/files/plaintext_probe.py"
WANTED = {
    name: f"__ipsec_{name}" for name in ("peers", "addresses", "let_in", "first_ports")
} | {
    name.split(".")[0].replace("-", "_"): f"lookup('ansible.builtin.template', '{name}.j2')"
    for name in ("input.nft", "output.nft", "refuse-input.nft", "refuse-output.nft", "swanctl.conf", "strongswan.service")
}  # fmt: skip


def made_of(folder: Path, **given: Any) -> Any:
    """What the role makes on the second of two hosts."""
    return rendered(folder, "ipsec", WANTED, "train2", HOSTS, {**GIVEN, **given}, configured=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_of(tmp_path_factory.mktemp("role"))


def rules_of(tmp_path_factory: pytest.TempPathFactory, made: Any, given: dict[str, Any]) -> str:
    """All rules of such a host: role base's, what MADE has of role ipsec, and role llm_training's."""
    folder = tmp_path_factory.mktemp("base")
    rules = {"rules": "lookup('ansible.builtin.template', 'nftables.conf.j2')"}
    groups = {"control": ["train1"], "mirror": ["train1"]}
    base = rendered(folder, "base", rules, "train2", HOSTS, {"role_path": str(ROOT / "roles/base")}, groups)
    folder = tmp_path_factory.mktemp("training")
    ways = {way: f"lookup('ansible.builtin.template', '{way}.nft.j2')" for way in ("input", "output")}
    training = rendered(folder, "llm_training", ways, "train2", HOSTS, given)
    training["output"] = training["output"].replace("meta skuid llm-train ", "")  # no such user here
    text: str = base["rules"].replace('include "/etc/nftables.d/sets-*.nft"', "")
    for way in ("input", "output"):
        text = text.replace(f'include "/etc/nftables.d/refuse-{way}-*.nft"', made[f"refuse_{way}"])
        text = text.replace(f'include "/etc/nftables.d/{way}-*.nft"', made[way] + training[way])
    assert "include" not in text
    return text


@pytest.fixture(scope="module")
def firewall(made: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With role llm_training's rules as they are without encryption: role ipsec refuses by itself."""
    return rules_of(tmp_path_factory, made, CLEAR)


@pytest.fixture(scope="module")
def without_ipsec() -> dict[str, str]:
    """What a host has of role ipsec that it never ran."""
    return dict.fromkeys(("input", "output", "refuse_input", "refuse_output"), "")


def seen_in_clear(rules: str) -> subprocess.CompletedProcess[str]:
    """The role's own look at rules that hold in a namespace."""
    look = [sys.executable, str(PROBE), HOSTS["train2.estate.internal"], HOSTS["train1.estate.internal"]]
    script = 'nft --file - && exec "$@"'
    return subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "look", *look, "29400", "32768"],
        input=rules, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_nothing_passes_in_clear_where_no_ipsec_is(firewall: str) -> None:
    seen = seen_in_clear(firewall)
    assert (seen.returncode, seen.stdout) == (0, ""), seen.stderr


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (GIVEN, ""),
        (CLEAR, "in clear passes: a new connection from a peer\n"),
    ],
    ids=["by default", "not encrypted"],
)
def test_role_llm_training_opens_no_port_in_clear(
    without_ipsec: dict[str, str],
    given: dict[str, Any],
    seen: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = seen_in_clear(rules_of(tmp_path_factory, without_ipsec, given))
    new = "".join(line for line in found.stdout.splitlines(True) if "new connection" in line)
    assert new == seen, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("gone", "passes"),
    [
        ("meta ipsec missing", "what a peer sends on a connection that stands"),
        ("rt ipsec missing", "what this host sends on a connection that stands"),
        (f"10.0.0.21 tcp sport != {PORTS}", "a new connection from a peer"),
    ],
)
def test_each_rule_that_refuses_is_needed(firewall: str, gone: str, passes: str) -> None:
    without = "".join(line for line in firewall.splitlines(True) if gone not in line)
    assert without != firewall
    seen = seen_in_clear(without)
    assert (seen.returncode, seen.stdout) == (1, f"in clear passes: {passes}\n"), seen.stderr


def test_only_ike_and_esp_of_the_other_host_are_let_in(made: Any) -> None:
    assert made["input"] == (
        "ip saddr 10.0.0.21 udp sport 500 udp dport 500 accept\nip saddr 10.0.0.21 meta l4proto esp accept\n"
    )
    assert made["output"] == made["input"].replace("saddr", "daddr")
    assert made["let_in"] == [line.removeprefix("ip ") for line in made["input"].splitlines()]


def test_each_peer_is_one_name_under_the_estate_s_root_and_there_is_no_secret(made: Any) -> None:
    conf = made["swanctl"]
    assert re.findall(r"id = (.*)", conf) == ["train2.estate.internal", "train1.estate.internal"]
    assert "cacerts = /etc/llmkeep/pki/root.pem" in conf
    assert re.findall(r"auth = (.*)", conf) == ["pubkey", "pubkey"]
    assert "secret" not in conf
    assert re.findall(r"_ts = (.*)", conf) == ["dynamic[tcp/29400],dynamic[tcp/32768-60999]"] * 2
    assert "mode = transport" in conf


def test_the_unit_is_hardened_and_hears_its_peers_only(made: Any, tmp_path: Path) -> None:
    assert "IPAddressAllow=10.0.0.21" in made["strongswan"].splitlines()
    debian = "[Service]\nType=notify\nExecStart=/usr/sbin/charon-systemd\n"
    hardened(tmp_path, "strongswan.service", debian + made["strongswan"], exposure=17)


@pytest.mark.parametrize(
    "given",
    [{"llm_training_encrypt": False}, {"llm_training_hosts": ["train2"]}, {"llm_training_hosts": ["train1"]}],
    ids=["not asked for", "alone", "not among them"],
)
def test_where_nobody_is_to_be_spoken_to_there_is_no_peer(tmp_path: Path, given: dict[str, Any]) -> None:
    made = made_of(tmp_path, **given)
    assert made["peers"] == []
    assert {entry["state"] for entry in made["tree"]["files"] + made["tree"]["links"]} == {"absent"}
