"""Hosts whose inventory names tokens and a PIN of their own share neither with another host."""

from pathlib import Path
from typing import Any

import pytest
from plugin_modules import ROOT
from rendered_role import rendered

HOSTS = {
    f"{name}.estate.internal": f"10.0.0.{last}" for name, last in (("ops1", 1), ("llm1", 2), ("llm2", 3))
}
GROUPS = {"storage": ["llm1", "llm2"], "softhsm": ["ops1"]}
OWN = {
    "hsm_token": "llmkeep-{{ inventory_hostname }}",
    "hsm_spare_token": "llmkeep-spare-{{ inventory_hostname }}",
    "hsm_pin": "llmkeep.hsm-pin-{{ inventory_hostname }}",
}


def made_of(folder: Path, role: str, host: str, wanted: dict[str, str]) -> Any:
    # In the inventory for what reads hostvars, and over the defaults, which are files of the play here.
    given = {"role_path": str(ROOT / f"roles/{role}"), "ansible_facts": {"os_family": "Debian"}, **OWN}
    return rendered(folder, role, wanted, host, HOSTS, given, GROUPS, inventory=OWN)


def test_the_lab_s_hsm_makes_tokens_and_a_pin_for_each_host(tmp_path: Path) -> None:
    assert made_of(tmp_path, "softhsm", "ops1", {"pins": "__softhsm_pins"})["pins"] == [
        {
            "home": f"llmkeep.hsm-pin-{host}",
            "name": f"softhsm.user-pin-{host}",
            "tokens": [f"llmkeep-{host}", f"llmkeep-spare-{host}"],
        }
        for host in GROUPS["storage"]
    ]


def test_hosts_that_sign_modules_have_a_token_whose_pin_the_provider_reads_whole(tmp_path: Path) -> None:
    given = {"role_path": str(ROOT / "roles/softhsm"), "ansible_facts": {"os_family": "Debian"}}
    groups = {**GROUPS, "gpu": ["llm1", "gpu1"]}
    wanted = {"signers": "softhsm_module_signers", "pins": "__softhsm_pins"}
    made = rendered(tmp_path, "softhsm", wanted, "ops1", HOSTS, given, groups)
    assert made["signers"] == ["llm1"]
    name = "softhsm.modules-pin"
    (pin,) = [pin for pin in made["pins"] if pin["name"] == name]
    assert pin == {"home": "llmkeep.modules-pin", "name": name, "tokens": ["llmkeep-modules"], "bytes": 15}


@pytest.mark.parametrize("host", GROUPS["storage"])
def test_a_host_uses_its_own_tokens_and_pin(tmp_path: Path, host: str) -> None:
    wanted = {"double_pin": "__hsm_double_pin", "tokens": "__hsm_settings.tokens", "home": "hsm_pin"}
    assert made_of(tmp_path, "hsm", host, wanted) == {
        "double_pin": f"softhsm.user-pin-{host}",
        "tokens": [f"llmkeep-{host}", f"llmkeep-spare-{host}"],
        "home": f"llmkeep.hsm-pin-{host}",
    }


def test_a_host_s_volumes_are_enrolled_with_its_own_tokens(tmp_path: Path) -> None:
    made = made_of(tmp_path, "luks", "llm2", {"token": "__luks_token", "spare": "__luks_spare"})
    assert made["token"] == "pkcs11:token=llmkeep-llm2;object=llm2;type=public"
    assert made["spare"] == "pkcs11:token=llmkeep-spare-llm2;object=llm2;type=public"
