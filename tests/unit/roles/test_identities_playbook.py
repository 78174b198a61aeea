"""playbooks/identities.yml against two hosts of this machine, each with a keys file and a pepper of its own."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
LLM_SERVE = ROOT / "payload/.venv/bin/llm-serve"
HOSTS = ("llm1", "llm2")


@dataclass
class Estate:
    """Its folder has one folder a host, with a script in the place of /usr/local/bin/llm-serve."""

    folder: Path

    def play(self, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
        """Run the playbook, as talkative as it can be."""
        told = {f"identity_{name}": value for name, value in given.items()}
        programs = f"{self.folder}/{{{{ inventory_hostname }}}}/llm-serve"
        variables = json.dumps({**told, "identity_llm_serve": [programs]})
        command = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            "-i",
            str(self.folder / "hosts.yml"),
        ]
        return subprocess.run(
            [*command, str(ROOT / "playbooks/identities.yml"), "-e", variables, "-vvv", "--diff", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        )

    def records(self, host: str) -> dict[str, Any]:
        """By id."""
        file = self.folder / host / "keys.json"
        keys = json.loads(file.read_text())["keys"] if file.exists() else []
        return {record["id"]: record for record in keys}

    def lie(self, host: str, sed: str) -> None:
        """From now on HOST alters what its llm-serve prints."""
        program = self.folder / host / "llm-serve"
        program.write_text(program.read_text().replace("exec ", "").rstrip("\n") + f" | sed '{sed}'\n")


@pytest.fixture
def estate(tmp_path: Path) -> Estate:
    """Two hosts that serve, and a control node."""
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    for host in HOSTS:
        (tmp_path / host).mkdir()
        (tmp_path / host / "llm-gateway.pepper").write_text(host * 16)
        program = tmp_path / host / "llm-serve"
        program.write_text(
            f'#!/bin/sh\nexport CREDENTIALS_DIRECTORY={tmp_path / host}\necho "$*" >> {tmp_path}/arguments\n'
            f'exec {LLM_SERVE} "$@" --keys-file {tmp_path / host}/keys.json\n'
        )
        program.chmod(0o755)
    groups = {"serve": dict.fromkeys(HOSTS, local), "control": {"ops1": local}}
    hosts = {"all": {"children": {name: {"hosts": of} for name, of in groups.items()}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(hosts))
    return Estate(tmp_path)


WHO = {"subject": "ada@corp", "tenant": "corp", "roles": "analyst, auditor"}


def test_a_new_key_is_good_on_all_hosts_and_stands_in_one_private_file_only(estate: Estate) -> None:
    file = estate.folder / "ada.json"
    done = estate.play(verb="add", expires="30d", file=str(file), **WHO)
    assert done.returncode == 0, done.stdout + done.stderr
    added = json.loads(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secret = added["key"].split("_")[2]
    assert secret not in done.stdout + done.stderr
    assert secret not in (estate.folder / "arguments").read_text()
    assert (estate.folder / "arguments").read_text().split("\n")[0] == "keys import --json"
    one, two = (estate.records(host)[added["id"]] for host in HOSTS)
    assert one["roles"] == ["analyst", "auditor"]
    assert one.pop("hash") != two.pop("hash")
    assert one == two
    assert f"{added['id']}  api_key  live  ada@corp" in done.stdout

    again = estate.play(verb="add", file=str(file), **WHO)
    assert (again.returncode, "there already" in again.stdout) == (2, True)
    assert len(estate.records("llm1")) == 1

    new_file = estate.folder / "ada2.json"
    rotated = estate.play(verb="rotate", id=added["id"], overlap="1h", file=str(new_file))
    assert rotated.returncode == 0, rotated.stdout + rotated.stderr
    new = json.loads(new_file.read_text())
    assert new["key"].split("_")[2] not in rotated.stdout + rotated.stderr
    assert [set(estate.records(host)) for host in HOSTS] == [{added["id"], new["id"]}] * 2
    assert len({estate.records(host)[added["id"]]["expires"] for host in HOSTS}) == 1

    revoked = estate.play(verb="revoke", subject="ada@corp")
    assert revoked.returncode == 0, revoked.stdout
    assert all(record["revoked"] for host in HOSTS for record in estate.records(host).values())


def test_a_host_that_lacks_a_key_is_named_and_gets_it_by_import(estate: Estate) -> None:
    file = estate.folder / "ada.json"
    (estate.folder / "llm2" / "keys.json").write_text("broken")
    done = estate.play(verb="add", file=str(file), **WHO)
    assert done.returncode == 2
    assert "llm2 did not take it over" in done.stdout
    secret = json.loads(file.read_text())["key"].split("_")[2]
    assert secret not in done.stdout + done.stderr
    (estate.folder / "llm2" / "keys.json").unlink()
    number = json.loads(file.read_text())["id"]
    listed = estate.play()
    assert (listed.returncode, f"{number} is missing on llm2" in listed.stdout) == (2, True)
    imported = estate.play(verb="import", file=str(file))
    assert imported.returncode == 0, imported.stdout
    assert secret not in imported.stdout + imported.stderr
    assert set(estate.records("llm1")) == set(estate.records("llm2")) == {number}
    assert estate.play("--check").returncode == 0


def test_a_certificate_of_the_control_node_is_registered_on_all_hosts(estate: Estate) -> None:
    pem = estate.folder / "robot.pem"
    made = ["-keyout", "/dev/null", "-out", str(pem), "-subj", "/CN=robot", "-days", "2"]
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run(["openssl", "req", "-x509", *new, *made], check=True, capture_output=True)
    done = estate.play(verb="add", certificate=str(pem), **WHO)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (list(estate.records(host).values()) for host in HOSTS)
    assert one == two
    assert (one[0]["kind"], len(one[0]["fingerprint"])) == ("certificate", 64)


LIE = 's/"ada@corp"/"cfo"/; s/"tenant": "corp"/"tenant": "bank"/; s/"analyst", "auditor"/"operator"/'
HOLDER = ("ada@corp", "corp", ["analyst", "auditor"])


def holders(estate: Estate, host: str) -> list[tuple[str, str, list[str]]]:
    return [(each["subject"], each["tenant"], each["roles"]) for each in estate.records(host).values()]


def test_a_host_that_names_another_holder_has_no_say_on_the_others(estate: Estate) -> None:
    file = estate.folder / "ada.json"
    estate.lie("llm1", LIE)
    added = estate.play(verb="add", file=str(file), **WHO)
    assert holders(estate, "llm2") == [HOLDER]
    assert added.returncode == 2
    [number] = estate.records("llm2")
    assert f"subject of {number} is cfo on llm1, ada@corp on llm2" in added.stdout

    new_file = estate.folder / "ada-2.json"
    rotated = estate.play(verb="rotate", id=number, file=str(new_file))
    assert rotated.returncode == 2
    for differing in (
        "subject of {} is cfo on llm1, ada@corp on llm2",
        "tenant of {} is bank on llm1, corp on llm2",
    ):
        assert differing.format(number) in rotated.stdout
    assert not new_file.exists()
    assert list(estate.records("llm2")) == [number]
    assert estate.records("llm2")[number]["expires"] is None


def test_one_host_of_several_does_not_say_alone_whose_key_is_rotated(estate: Estate) -> None:
    file = estate.folder / "ada.json"
    assert estate.play(verb="add", file=str(file), **WHO).returncode == 0
    [number] = estate.records("llm2")
    estate.lie("llm1", LIE)
    request = {"verb": "rotate", "id": number, "file": str(estate.folder / "ada-2.json")}
    alone = estate.play("--limit", "llm1,ops1", **request)
    assert alone.returncode == 2
    assert f"only llm1 of llm1, llm2 says whose key {number} is: set identity_subject" in alone.stdout
    stated = estate.play("--limit", "llm1,ops1", **request, **WHO)
    assert stated.returncode == 2
    assert f"subject of {number} is cfo on llm1, and expected ada@corp" in stated.stdout
    assert list(estate.records("llm1")) == list(estate.records("llm2")) == [number]
    rotated = estate.play("--limit", "llm2,ops1", **request, **WHO)
    assert rotated.returncode == 0, rotated.stdout
    assert holders(estate, "llm2") == [HOLDER] * 2


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"verb": "give"}, "Take one of list, add, rotate, revoke, import"),
        ({"verb": "add", "subject": "ada"}, "Set identity_tenant, identity_roles, identity_file"),
        ({"verb": "rotate"}, "Set identity_id, identity_file"),
        ({"verb": "revoke"}, "Set identity_id"),
        ({"verb": "revoke", "id": "0123"}, "No host has the key 0123"),
        ({"verb": "import", "file": "/nowhere/key"}, "not there"),
        ({"verb": "rotate", "id": "0123", "file": "/tmp/llmkeep-no-such-key"}, "there is no key '0123'"),
        (
            {"verb": "add", **WHO, "roles": "two words", "file": "/tmp/llmkeep-no-such-key"},
            "'two words' is not a valid name: use up to 64 letters, digits and . _ @ -. Nothing was changed.",
        ),
        (
            {"verb": "add", **WHO, "expires": "90", "file": "/tmp/llmkeep-no-such-key"},
            "'90' is not a lifetime",
        ),
        ({"verb": "add", **WHO, "roles": ",", "file": "/tmp/llmkeep-no-such-key"}, "there is no role"),
    ],
)
def test_refuses_with_the_reason_and_changes_nothing(
    estate: Estate, given: dict[str, str], reason: str
) -> None:
    done = estate.play(**given)
    assert done.returncode == 2
    assert reason in " ".join(done.stdout.split())
    assert [estate.records(host) for host in HOSTS] == [{}, {}]


def test_check_mode_makes_no_key(estate: Estate) -> None:
    done = estate.play("--check", verb="add", file=str(estate.folder / "ada.json"), **WHO)
    assert done.returncode == 0, done.stdout
    assert not (estate.folder / "ada.json").exists()
    assert not (estate.folder / "arguments").exists()
