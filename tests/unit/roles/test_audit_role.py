"""What role audit does on the control node, without one."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from plugin_modules import ROOT

LOOK = (ROOT / "roles/audit/files/first-look.sh").read_text()


@pytest.mark.parametrize(("kept", "looked"), [(["llm1", "llm2"], 0), (["llm1"], 1), ([], 1)])
def test_a_look_is_begun_once_where_nothing_is_kept_of_a_host(
    kept: list[str], looked: int, tmp_path: Path
) -> None:
    for host in kept:
        (tmp_path / host).mkdir()
        (tmp_path / host / "verifier").write_text("a key")
    program = tmp_path / "systemctl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit 3\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", LOOK, "look", str(tmp_path), "llm1", "llm2"], check=True, env=environment)
    asked = tmp_path / "asked"
    assert (asked.read_text() if looked else "") == "start llmkeep-audit-witness.service\n" * looked
    assert asked.exists() == bool(looked)


@pytest.mark.parametrize(("days", "refused"), [(179, True), (180, False)])
def test_records_are_kept_for_180_days_or_more(days: int, refused: bool, tmp_path: Path) -> None:
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False,
            "vars": {"audit_keep_days": days, "__common_system": "Debian 13", "_common_tested": ["Debian 13"]},
            "tasks": [{"ansible.builtin.import_tasks": str(ROOT / "roles/_common/tasks/preflight.yml")}]}  # fmt: skip
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    (tmp_path / "hosts.yml").write_text("all: {hosts: {localhost: {}}}\n")
    program = [
        str(ROOT / ".venv/bin/ansible-playbook"),
        "-i",
        str(tmp_path / "hosts.yml"),
        str(tmp_path / "play.yml"),
    ]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env=os.environ | {"ANSIBLE_CONFIG": ""}
    )
    assert (done.returncode != 0) == refused, done.stdout
    assert ("kept for 180 days or more" in done.stdout) == refused
