"""Exceptions of role hardening by group, and which changes of files it takes for explained."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from plugin_modules import ROOT
from rendered_role import rendered

HOSTS = {"llm1.estate.internal": "10.0.0.1", "llm2.estate.internal": "10.0.0.2"}
NAMES = {
    "sysctl": "__hardening_sysctl",
    "modules": "__hardening_modules",
    "sudoers": "lookup('ansible.builtin.template', 'sudoers.j2')",
    "options": "__hardening_options",
    "confined": "__hardening_confined",
}
# What the first task of a host with a kernel of its own reads.
ON_A_KERNEL = {"__hardening_places": {"stdout_lines": ["fstab /boot"]}}


def made(folder: Path, groups: dict[str, list[str]], **variables: Any) -> Any:
    return rendered(folder, "hardening", NAMES, "llm1", HOSTS, ON_A_KERNEL | variables, groups)


def test_a_host_of_no_group_has_no_exception(tmp_path: Path) -> None:
    host = made(tmp_path, {})
    assert host["sysctl"]["net.ipv4.conf.all.arp_ignore"] == "2"
    assert host["sysctl"]["net.ipv6.conf.all.accept_ra"] == "0"
    assert "usb-storage" in host["modules"]
    assert "!requiretty" not in host["sudoers"]


def test_an_address_that_moves_is_learned_by_every_host(tmp_path: Path) -> None:
    host = made(tmp_path, {"keepalived": ["llm2"]})
    assert host["sysctl"]["net.ipv4.conf.all.drop_gratuitous_arp"] == "0"
    assert host["sysctl"]["net.ipv4.conf.all.arp_ignore"] == "1"


def test_hosts_that_train_keep_their_ports(tmp_path: Path) -> None:
    assert made(tmp_path, {"train": ["llm1"]})["sysctl"]["net.ipv4.ip_local_port_range"].split() == [
        "32768",
        "60999",
    ]


def test_the_control_node_reads_media(tmp_path: Path) -> None:
    assert "usb-storage" not in made(tmp_path, {"control": ["llm1"]})["modules"]


def test_routers_are_heard_where_ipv6_is_used(tmp_path: Path) -> None:
    assert "net.ipv6.conf.all.accept_ra" not in made(tmp_path, {}, base_ipv6=True)["sysctl"]


def test_an_estate_sets_parameters_and_modules_of_its_own(tmp_path: Path) -> None:
    host = made(
        tmp_path, {}, hardening_sysctl={"kernel.pid_max": "4194304"}, hardening_modules_allowed=["sctp"]
    )
    assert host["sysctl"]["kernel.pid_max"] == "4194304"
    assert "sctp" not in host["modules"]


def test_another_user_of_ansible_becomes_root_without_a_terminal(tmp_path: Path) -> None:
    assert "Defaults:admin !requiretty, !noexec" in made(tmp_path, {}, ansible_user="admin")["sudoers"]


PARSER = shutil.which("apparmor_parser", path=f"{os.environ['PATH']}:/usr/sbin")


def profiles(**variables: str) -> str:
    text = (ROOT / "roles/hardening/templates/apparmor.profiles.j2").read_text()
    templates = jinja2.Environment(autoescape=False, trim_blocks=True)  # noqa: S701 - of a policy
    return templates.from_string(text).render(variables)


def compiled(policy: str) -> subprocess.CompletedProcess[str]:
    if not PARSER:
        pytest.skip("there is no apparmor_parser here: apt-get install apparmor")
    words = [PARSER, "--skip-kernel-load", "--skip-cache", "--quiet"]
    return subprocess.run(words, input=policy, capture_output=True, text=True, check=False)


def test_each_unit_has_a_profile_that_compiles_and_enforces(tmp_path: Path) -> None:
    units = made(tmp_path, {})["confined"]
    policy = profiles()
    assert set(re.findall(r"^profile (\S+) ", policy, re.MULTILINE)) == set(units.values())
    assert set(re.findall(r"flags=\((.*)\)", policy)) == {"attach_disconnected"}
    done = compiled(policy)
    assert done.returncode == 0, done.stderr


def test_a_rule_that_is_none_is_refused() -> None:
    assert compiled(profiles().replace("network unix,", "network everything,")).returncode != 0


def test_elasticsearch_writes_snapshots_where_the_inventory_has_them() -> None:
    assert "  /var/lib/elasticsearch-snapshots/** rwl,\n" in profiles()
    assert "  /srv/snapshots/** rwl,\n" in profiles(elasticsearch_snapshot_path="/srv/snapshots")


def test_units_whose_profile_was_never_tried_have_none(tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir()
    units = made(tmp_path, {"gpu": ["llm1"]})["confined"]
    assert "llm-engine@.service" not in units
    assert "llm-gateway@.service" in units
    assert "nginx.service" not in made(tmp_path / "edge", {}, edge_key_source="hsm")["confined"]


@pytest.fixture
def integrity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with dpkg's lists and llmkeep's hashes in a folder of the test's."""
    path = ROOT / "roles/hardening/files/integrity.py"
    spec = importlib.util.spec_from_file_location("integrity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "info").mkdir()
    monkeypatch.setattr(module, "PACKAGES", tmp_path / "info")
    monkeypatch.setattr(module, "WRITTEN", tmp_path / "sha256.json")
    return module


def test_a_file_as_its_package_has_it_is_explained(integrity: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("new version")
    md5 = hashlib.md5(program.read_bytes(), usedforsecurity=False).hexdigest()
    integrity.PACKAGES.joinpath("tool.md5sums").write_text(f"{md5}  {str(program)[1:]}\n")
    assert integrity.unexplained([str(program)]) == []
    program.write_text("altered")
    assert integrity.unexplained([str(program)]) == [str(program)]


def test_a_file_as_llmkeep_wrote_it_is_explained(integrity: ModuleType, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("declared")
    digests = {str(settings): hashlib.sha256(b"declared").hexdigest()}
    integrity.WRITTEN.write_text(json.dumps(digests))
    assert integrity.unexplained([str(settings)]) == []
    settings.write_text("drifted")
    assert integrity.unexplained([str(settings)]) == [str(settings)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"/etc/passwd": 1}'])
def test_hashes_that_cannot_be_read_explain_nothing(integrity: ModuleType, tmp_path: Path, text: str) -> None:
    integrity.WRITTEN.write_text(text)
    stranger = tmp_path / "stranger"
    stranger.write_text("x")
    assert integrity.unexplained([str(stranger)]) == [str(stranger)]


def test_a_link_in_place_of_a_file_is_no_package_s(integrity: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(target)
    md5 = hashlib.md5(b"x", usedforsecurity=False).hexdigest()
    integrity.PACKAGES.joinpath("tool.md5sums").write_text(f"{md5}  {str(link)[1:]}\n")
    assert integrity.unexplained([str(link)]) == [str(link)]


def test_folders_are_no_differences_of_their_own(integrity: ModuleType) -> None:
    report = {"added": {"/etc/new": "f++++", "/etc/d": "d++++"}, "changed": {"/etc/a b;$x": "f > H"}}
    assert integrity.differences(report) == ["/etc/a b;$x", "/etc/new"]
