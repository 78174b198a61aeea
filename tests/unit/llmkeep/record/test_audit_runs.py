"""What is run from the control node is on record, without secrets; what cannot be recorded does not run."""

import json
import os
import subprocess
import sys
import syslog
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sealing_double
import yaml
from audit_records import checked, whole
from revoked_hosts import Estate
from small_tree import PLAYBOOK

from llmkeep import cli, revoke, source_tree
from llmkeep.pki.revocations import revoked_names
from llmkeep.record import commands as audit
from llmkeep.record import runs as record

MARK = (
    "  tasks:\n    - {name: Leave a mark, ansible.builtin.copy: {content: ran, dest: '%s', mode: '0600'}}\n"
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A developer's tree: no seed, nothing is recorded."""
    root = tmp_path / "tree"
    (root / "playbooks").mkdir(parents=True)
    (root / "site.yml").write_text(PLAYBOOK.format(said="{{ greeting | default('hello') }}", good="true"))
    (root / "playbooks/bad.yml").write_text(PLAYBOOK.format(said="bad", good="false"))
    (root / "ansible.cfg").write_text("[defaults]\nnocows = true\n")
    (root / "hosts.yml").write_text("all: {hosts: {here: {ansible_connection: local}}}\n")
    monkeypatch.setattr(source_tree, "located", lambda: root)
    monkeypatch.setattr(source_tree, "INSTALLED", tmp_path / "opt/llmkeep/tree")
    monkeypatch.setattr(record, "FOLDER", tmp_path / "log/llmkeep-audit")
    monkeypatch.setattr(record, "SEALED_SEED", tmp_path / "credstore/llmkeep-audit.seed")
    monkeypatch.setattr(record, "SERIAL", tmp_path / "serial")
    sealing_double.use(monkeypatch, audit, record)
    monkeypatch.chdir(root)
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield root


@pytest.fixture
def node(checkout: Path) -> Path:
    """The control node of an estate."""
    assert cli.main(["audit", "init"]) == 0
    (checkout.parent / "serial").write_text("7\n")
    return checkout


def records() -> list[dict[str, object]]:
    """What is on record."""
    return [json.loads(line) for line in whole(record.FOLDER)]


@pytest.mark.usefixtures("checkout")
def test_a_developers_checkout_writes_nothing() -> None:
    assert cli.main(["site", "-i", "hosts.yml"]) == 0
    assert not record.FOLDER.exists()


def test_a_run_leaves_an_intent_an_outcome_and_a_signed_head(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    assert cli.main(["site", "-i", "hosts.yml", "-l", "here", "--check"]) == 0
    intent, outcome = records()
    assert intent["llmkeep.audit.phase"] == "intent"
    assert intent["event.action"] == outcome["event.action"] == "run site.yml"
    assert intent["event.type"] == ["info"]
    assert intent["user.name"] == "alice"
    assert intent["llmkeep.inventory"] == [str(node / "hosts.yml")]
    assert intent["llmkeep.bundle.serial"] == "7"
    assert intent["process.args"] == ["--limit", "here", "--check"]
    assert outcome["llmkeep.run.id"] == intent["llmkeep.run.id"]
    assert (outcome["event.outcome"], outcome["process.exit_code"]) == ("success", 0)
    assert outcome["llmkeep.run.hosts"] == [
        {"host.name": "here", "ok": 2, "changed": 0, "failed": 0, "unreachable": 0}
    ]
    report = checked(record.FOLDER)
    assert (report.ok, report.open_tail, report.pending, report.heads) == (True, 0, 0, 2)


FAILING_REPORT = """
- hosts: all
  gather_facts: false
  tasks:
    - {name: Report, copy: {content: '{"ok": false, "checks": 9, "failed": 2}', dest: "{{ verify_report }}", mode: "0600"}}
    - {name: Fail, fail: {msg: two checks}}
"""


def test_metrics_are_told_of_whole_runs_alone(node: Path) -> None:
    (node / "playbooks/verify.yml").write_text(FAILING_REPORT)
    applied, verified = (record.SERIAL.with_name(name) for name in (record.APPLIED, record.VERIFIED))
    for words in (["-l", "here"], ["-t", "base"], ["--check"], ["--", "--limit", "here"]):
        cli.main(["site", "-i", "hosts.yml", *words])
        cli.main(["verify", "-i", "hosts.yml", *words])
        assert not applied.exists()
        assert not verified.exists()
    cli.main(["run", "playbooks/bad.yml", "-i", "hosts.yml"])
    assert not applied.exists()
    assert cli.main(["site", "-i", "hosts.yml"]) == 0
    assert json.loads(applied.read_text()) == {"serial": 7}
    assert cli.main(["verify", "-i", "hosts.yml"]) == 1
    assert json.loads(verified.read_text()) == {"ok": False, "checks": 9, "failed": 2}


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("less", [["--syntax-check"], ["--list-hosts"], ["--start-at-task", "Leave"]])
def test_metrics_are_not_told_of_an_ansible_playbook_that_runs_less(
    less: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ansible-playbook", "-i", "hosts.yml", *less, "site.yml"])
    assert cli.main() == 0
    assert not record.SERIAL.with_name(record.APPLIED).exists()


def test_what_was_applied_is_the_bundle_that_the_run_began_with(node: Path) -> None:
    another = {
        "name": "Another",
        "ansible.builtin.copy": {"content": "8", "dest": str(record.SERIAL), "mode": "0600"},
    }
    (node / "site.yml").write_text(
        yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": [another]}])
    )
    assert cli.main(["site", "-i", "hosts.yml"]) == 0
    assert record.SERIAL.read_text() == "8"
    assert json.loads(record.SERIAL.with_name(record.APPLIED).read_text()) == {"serial": 7}


def test_a_bare_ansible_playbook_is_on_record_with_names_of_variables_only(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-i", "hosts.yml", "--forks", "2", "-e", "greeting=secret", "--limit", "here", "site.yml"]
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/ansible-playbook", *words])
    assert cli.main() == 0
    intent, outcome = records()
    assert intent["event.action"] == "run site.yml"
    assert intent["process.args"] == ["--limit", "here", "--extra-vars", "greeting"]
    assert intent["llmkeep.inventory"] == [str(node / "hosts.yml")]
    assert outcome["event.outcome"] == "success"


def test_a_bare_ansible_playbook_that_cannot_be_recorded_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source_tree, "INSTALLED", checkout)
    monkeypatch.setattr(sys, "argv", ["ansible-playbook", "-i", "hosts.yml", "site.yml"])
    assert cli.main() == 1
    told = capfd.readouterr()
    assert "Runs without a record are refused" in told.err
    assert "PLAY" not in told.out


@pytest.mark.usefixtures("node")
def test_a_failed_run_is_on_record_as_failed() -> None:
    assert cli.main(["run", "playbooks/bad.yml", "-i", "hosts.yml"]) == 1
    outcome = records()[-1]
    assert (outcome["event.action"], outcome["event.outcome"]) == ("run playbooks/bad.yml", "failure")
    assert outcome["llmkeep.run.hosts"] == [
        {"host.name": "here", "ok": 1, "changed": 0, "failed": 1, "unreachable": 0}
    ]


def test_verify_is_on_record_too(node: Path) -> None:
    (node / "playbooks/verify.yml").write_text("- {hosts: all, gather_facts: false, tasks: []}\n")
    assert cli.main(["verify", "-i", "hosts.yml", "--json"]) == 1
    assert [each["event.action"] for each in records()] == ["run playbooks/verify.yml"] * 2


REPORT = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.copy: {content: '{"ok": true, "not_enforceable": ["llm1: opa.memory_is_bounded: no controller"]}',
                             dest: "{{ verify_report }}", mode: "0600"}
"""


def test_what_no_kernel_enforces_is_on_record(node: Path) -> None:
    (node / "playbooks/verify.yml").write_text(REPORT)
    assert cli.main(["verify", "-i", "hosts.yml", "--json"]) == 0
    outcome = records()[-1]
    assert outcome["event.outcome"] == "success"
    assert outcome["llmkeep.checks.not_enforceable"] == ["llm1: opa.memory_is_bounded: no controller"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "Accept an untested system",
            "here: base.system_is_tested: Debian 14 was never tested, and base_untested_system accepts it",
        ),
        ("Accept an older image", "here: kubernetes.image_is_not_older: 41 answers slowly"),
    ],
)
def test_what_the_inventory_accepts_is_on_record_with_its_reason(node: Path, name: str, told: str) -> None:
    task = {"name": name, "ansible.builtin.debug": {"msg": told}}
    play = {"hosts": "all", "gather_facts": False, "tasks": [task, task]}
    (node / "site.yml").write_text(yaml.safe_dump([play]))
    assert cli.main(["site", "-i", "hosts.yml"]) == 0
    assert records()[-1]["llmkeep.checks.accepted"] == [told]
    (node / "playbooks/verify.yml").write_text(REPORT.replace('"not_enforceable"', '"accepted"'))
    assert cli.main(["verify", "-i", "hosts.yml", "--json"]) == 0
    assert records()[-1]["llmkeep.checks.accepted"] == ["llm1: opa.memory_is_bounded: no controller"]


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(
    "words",
    [["-e", "password=hunter2 greeting=hi"], ["-e", '{"password": "hunter2"}'], ["-e", "{password: hunter2}"],
     ["--", "-e", "password=hunter2"], ["--", "-epassword=hunter2"], ["--", "--extra-vars=password=hunter2"],
     ["--", "--extra=password=hunter2"], ["--", "-Cepassword=hunter2"], ["-e", "['hunter2']"], ["-e", "'hunter2"]],
)  # fmt: skip
def test_no_value_of_a_variable_is_ever_on_record(words: list[str]) -> None:
    cli.main(["site", "-i", "hosts.yml", *words])
    assert len(records()) == 2
    assert b"hunter2" not in b"".join(whole(record.FOLDER))


@pytest.mark.usefixtures("node")
def test_names_of_variables_and_files_are_on_record() -> None:
    assert record.variables("password=hunter2 greeting='good morning'") == ["password", "greeting"]
    assert record.variables('{"password": "hunter2", "a": {"b": 1}}') == ["a", "password"]
    assert record.variables("@secrets.yml") == ["@secrets.yml"]


def test_what_cannot_be_recorded_does_not_run_and_break_glass_is_loud(
    node: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (node / "site.yml").write_text("- hosts: all\n  gather_facts: false\n" + MARK % (node / "mark"))
    journal: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _level, text: journal.append(text))
    (record.FOLDER / "verifier").write_text("not a key")
    assert cli.main(["site", "-i", "hosts.yml"]) == 1
    said = capfd.readouterr().err
    assert "are refused; nothing was changed" in said
    assert "--unrecorded REASON" in said
    assert not (node / "mark").exists()
    assert journal == []
    assert cli.main(["site", "-i", "hosts.yml", "--unrecorded", "the disk died, users wait"]) == 0
    assert (node / "mark").read_text() == "ran"
    said = capfd.readouterr().err
    assert "WITHOUT AN AUDIT RECORD, reason: the disk died, users wait" in said
    assert "WITHOUT AN AUDIT RECORD" in journal[0]


@pytest.mark.usefixtures("node")
def test_break_glass_where_the_record_can_be_written_is_a_record_with_its_reason() -> None:
    assert cli.main(["site", "-i", "hosts.yml", "--unrecorded", "just in case"]) == 0
    assert [each["event.reason"] for each in records()] == ["just in case"] * 2


def test_the_bundles_tree_without_a_seed_is_refused_with_the_way_out(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source_tree, "INSTALLED", checkout)
    assert cli.main(["site", "-i", "hosts.yml"]) == 1
    assert "llmkeep audit init" in capfd.readouterr().err


def test_an_outcome_that_cannot_be_written_is_told_and_no_success(
    node: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syslog, "syslog", lambda _level, _text: None)
    task = f"  tasks: [{{ansible.builtin.file: {{path: {record.FOLDER}/verifier, state: absent}}}}]\n"
    (node / "site.yml").write_text("- hosts: all\n  gather_facts: false\n" + task)
    assert cli.main(["site", "-i", "hosts.yml"]) == 1
    assert "its outcome is not on record" in capfd.readouterr().err
    assert len(records()) == 1


@pytest.mark.usefixtures("node")
def test_a_run_waits_while_another_one_writes() -> None:
    program = ("import sys, time; from pathlib import Path; from llmproof.chain import Chain\n"
               "from llmkeep.record import runs as record\n"
               "record.SEALED_SEED = Path(sys.argv[2]); record.unseal = lambda sealed, name: sealed.split(b':')[1]\n"
               "with Chain(Path(sys.argv[1]), record.seed()):\n"
               "  print('held', flush=True); time.sleep(1.5); print(time.monotonic(), flush=True)")  # fmt: skip
    held = subprocess.Popen(
        [sys.executable, "-c", program, str(record.FOLDER), str(record.SEALED_SEED)], stdout=subprocess.PIPE
    )
    assert held.stdout
    assert held.stdout.readline() == b"held\n"
    record.append({"a": 1})
    after = time.monotonic()
    assert after > float(held.stdout.readline()), "the clock is that of both"
    assert held.wait(10) == 0
    assert len(records()) == 1


def test_init_repeats_harmlessly_and_never_makes_a_second_key(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed, key = record.SEALED_SEED.read_bytes(), (record.FOLDER / "verifier").read_text()
    assert sealed.startswith(b"sealed llmkeep-audit.seed:")
    assert record.SEALED_SEED.stat().st_mode & 0o777 == 0o400
    assert record.FOLDER.stat().st_mode & 0o777 == 0o700
    assert cli.main(["audit", "init"]) == 0
    assert record.SEALED_SEED.read_bytes() == sealed
    assert key.strip() in capsys.readouterr().out
    record.SEALED_SEED.unlink()
    assert cli.main(["audit", "init"]) == 1
    assert "restore the seed" in capsys.readouterr().err
    assert not record.SEALED_SEED.exists()
    assert node.exists()


@pytest.mark.usefixtures("node")
def test_a_seed_that_systemd_hands_over_needs_no_unsealing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = tmp_path / "handed"
    handed.mkdir()
    (handed / record.CREDENTIAL).write_bytes(record.SEALED_SEED.read_bytes().split(b":")[1])
    record.SEALED_SEED.unlink()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed))
    assert cli.main(["site", "-i", "hosts.yml"]) == 0
    assert len(records()) == 2


def test_audit_verify_and_show_read_the_control_nodes_record(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["site", "-i", "hosts.yml"])
    capsys.readouterr()
    assert cli.main(["audit", "verify", str(record.FOLDER)]) == 0
    assert cli.main(["audit", "show", str(record.FOLDER)]) == 0
    assert "run site.yml" in capsys.readouterr().out
    assert node.exists()


def test_who_asked_is_whom_sudo_names_else_whose_process_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    assert record.who() == "alice"
    monkeypatch.delenv("SUDO_USER")

    def nobody() -> str:
        raise OSError

    monkeypatch.setattr(os, "getlogin", nobody)
    assert record.who() == subprocess.check_output(["id", "-un"], text=True).strip()


def test_a_revocation_is_on_record_with_its_name_and_reason_before_it_is_made(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate = Estate(tmp_path, monkeypatch)
    estate.certificate("train1")
    monkeypatch.setattr(revoke, "Places", lambda: estate.places)
    (node / "playbooks/revoke.yml").write_text(PLAYBOOK.format(said="revoked", good="true"))
    assert cli.main(["pki", "revoke", "train1", "--reason", "stolen", "-i", "hosts.yml"]) == 0
    intent, outcome = records()
    assert (intent["event.action"], intent["event.reason"]) == ("pki revoke train1", "stolen")
    assert outcome["event.outcome"] == "success"
    assert list(revoked_names(estate.places)) == ["train1"]


def test_a_host_that_was_not_reached_by_a_revocation_has_an_exit_code_of_its_own(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate = Estate(tmp_path, monkeypatch)
    estate.certificate("train1")
    monkeypatch.setattr(revoke, "Places", lambda: estate.places)
    (checkout / "playbooks/revoke.yml").write_text(PLAYBOOK.format(said="no answer", good="false"))
    assert cli.main(["pki", "revoke", "train9", "--reason", "stolen", "-i", "hosts.yml"]) == 1
    assert cli.main(["pki", "revoke", "train1", "--reason", "stolen", "-i", "hosts.yml"]) == 3
    assert list(revoked_names(estate.places)) == ["train1"]
