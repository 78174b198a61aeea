"""The operator's verbs over a small tree of their own: output as it comes, exit codes, nothing left."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest
from small_tree import PLAYBOOK
from waiting import until

from llmkeep import cli, playbooks, source_tree
from llmkeep.places import Places


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tree with two playbooks, where `llmkeep` finds its own."""
    root = tmp_path / "tree"
    (root / "playbooks").mkdir(parents=True)
    (root / "site.yml").write_text(PLAYBOOK.format(said="{{ greeting | default('hello') }}", good="true"))
    (root / "playbooks/bad.yml").write_text(PLAYBOOK.format(said="bad", good="false"))
    (root / "ansible.cfg").write_text("[defaults]\nnocows = true\n")
    (root / "inventory").mkdir()
    (root / "inventory/hosts.yml").write_text("all: {hosts: {here: {ansible_connection: local}}}\n")
    monkeypatch.setattr(source_tree, "located", lambda: root)
    monkeypatch.chdir(tmp_path)
    # A short path: Ansible's workers speak over a socket in it, and the name of a socket has 108 bytes.
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield root


def left() -> list[Path]:
    """What a run left in its memory."""
    return list(Path(os.environ["TMPDIR"]).iterdir())


@pytest.mark.usefixtures("tree")
def test_a_run_prints_what_ansible_prints_with_its_recap_and_leaves_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["site", "-i", "inventory", "-e", "{greeting: good morning}"]) == 0
    output = capfd.readouterr().out
    assert "good morning" in output
    assert "PLAY RECAP" in output
    assert "\x1b[" not in output
    assert not left()


def test_site_is_the_trees_own_even_where_another_one_lies(
    tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tree.parent / "site.yml").write_text(PLAYBOOK.format(said="another tree", good="true"))
    assert cli.main(["site", "-i", "inventory"]) == 0
    assert "another tree" not in capfd.readouterr().out


@pytest.mark.usefixtures("tree")
def test_nothing_runs_from_a_control_node_whose_restore_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path)
    places.restoring.parent.mkdir(parents=True)
    places.restoring.write_text("{}")
    monkeypatch.setattr(playbooks, "PLACES", places)
    assert cli.main(["site", "-i", "inventory"]) == 1
    assert "a restore of the control node was interrupted; nothing was run" in capfd.readouterr().err


@pytest.mark.usefixtures("tree")
def test_a_failed_host_is_exit_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "playbooks/bad.yml", "-i", "inventory"]) == 1
    assert "not good" in capfd.readouterr().out
    assert not left()


def test_an_inventory_is_looked_for_where_one_stands_and_then_in_the_tree(tree: Path) -> None:
    assert playbooks.inventory_path("inventory", tree) == tree / "inventory"
    (tree.parent / "inventory").mkdir()
    assert playbooks.inventory_path("inventory", tree) == tree.parent / "inventory"
    assert playbooks.inventory_path(str(tree / "inventory"), tree) == tree / "inventory"


@pytest.mark.usefixtures("tree")
def test_an_inventory_that_is_nowhere_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["site", "-i", "estate"]) == 1
    assert "there is no inventory 'estate'" in capfd.readouterr().err


@pytest.mark.usefixtures("tree")
def test_a_playbook_that_is_nowhere_is_told_with_those_that_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "playbooks/good.yml", "-i", "inventory"]) == 1
    assert "playbooks/bad.yml" in capfd.readouterr().err


@pytest.mark.usefixtures("tree")
def test_words_for_ansible_go_through_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    value = json.dumps({"greeting": "a 'b' \"c\" $d; e"})
    assert (
        cli.main(["site", "-i", "inventory", "--check", "-l", "here", "-e", value, "--", "--forks", "2"]) == 0
    )
    assert "a 'b' \"c\" $d; e" in capfd.readouterr().out.replace('\\"', '"').replace("''", "'")
    assert cli.main(["site", "-i", "inventory", "-l", "nobody"]) == 1


REPORT = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - name: Write the report
      ansible.builtin.copy: {{content: '{{"ok": {good}}}', dest: "{{{{ verify_report }}}}", mode: "0600"}}
    - name: Tell what holds
      ansible.builtin.assert: {{that: {good}}}
"""


@pytest.mark.parametrize(("good", "code"), [("true", 0), ("false", 1)])
def test_verify_prints_the_report_alone_and_exits_by_it(
    tree: Path, capfd: pytest.CaptureFixture[str], good: str, code: int
) -> None:
    (tree / "playbooks/verify.yml").write_text(REPORT.format(good=good))
    assert cli.main(["verify", "-i", "inventory", "--json"]) == code
    assert json.loads(capfd.readouterr().out) == {"ok": code == 0}
    assert not left()


def test_verify_that_did_not_come_to_its_end_is_never_a_pass(
    tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "playbooks/verify.yml").write_text("- hosts: all\n  gather_facts: false\n  tasks: []\n")
    assert cli.main(["verify", "-i", "inventory", "--json"]) == 1
    told = capfd.readouterr()
    assert json.loads(told.out)["ok"] is False
    assert "nothing is proved" in told.err


def test_verify_keeps_the_report_where_it_is_told(tree: Path) -> None:
    (tree / "playbooks/verify.yml").write_text(REPORT.format(good="true"))
    assert cli.main(["verify", "-i", "inventory", "--report", "kept.json"]) == 0
    assert json.loads((tree.parent / "kept.json").read_text()) == {"ok": True}


def test_verify_names_the_chosen_roles_to_its_playbook_and_no_tags(
    tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = REPORT.replace(
        '"ok": {good}',
        '"only": {{{{ verify_roles | to_json }}}}, "not": {{{{ verify_skipped_roles | to_json }}}}',
    )
    (tree / "playbooks/verify.yml").write_text(chosen.format(good="true"))
    assert cli.main(["verify", "-i", "inventory", "--json", "-t", "opa,edge", "--skip-tags", "base"]) == 0
    assert json.loads(capfd.readouterr().out) == {"only": ["opa", "edge"], "not": ["base"]}


NAP = f"sleep 600.{os.getpid()}"  # of this test alone


def asleep() -> list[int]:
    """PIDs of what a run waits for."""
    found = subprocess.run(["pgrep", "--full", f"^{NAP}$"], capture_output=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def sleeping_run(tree: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A run of a process of its own that comes to no end, and the PID of its Ansible."""
    (tree / "playbooks/nap.yml").write_text(
        f"- hosts: all\n  gather_facts: false\n  tasks: [{{ansible.builtin.command: {NAP}}}]\n"
    )
    program = (
        "import pathlib, sys; from llmkeep import cli, source_tree; source_tree.located = lambda: pathlib.Path(sys.argv[1]); "
        "sys.exit(cli.main(['run', 'playbooks/nap.yml', '-i', 'inventory']))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, str(tree)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert any(b"TASK" in line for line in cast(IO[bytes], started.stdout))
    (ansible,) = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert b"ansible-playbook" in Path(f"/proc/{ansible}/cmdline").read_bytes()
    return started, ansible


def test_an_interrupted_run_ends_ansible_too_and_says_so(tree: Path) -> None:
    started, ansible = sleeping_run(tree)
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=60) == 130
    assert not Path(f"/proc/{ansible}").exists()
    until(lambda: not asleep())  # killed, and dying
    assert not left()


def test_what_a_killed_run_left_is_removed_by_the_next_and_what_a_running_one_has_is_not(tree: Path) -> None:
    """Ansible's temporary files may be users' text (playbooks/improve.yml)."""
    started, ansible = sleeping_run(tree)
    (text,) = left()
    (text / "journal.tar.gz").write_text("what users said")
    assert cli.main(["site", "-i", "inventory"]) == 0
    assert (text / "journal.tar.gz").exists()
    for pid in (started.pid, int(ansible), *asleep()):
        os.kill(pid, signal.SIGKILL)
    started.wait(timeout=60)
    assert left() == [text]
    assert cli.main(["site", "-i", "inventory"]) == 0
    assert not left()
