"""What role audit does on the control node, without one."""

import os
import subprocess
from pathlib import Path

import pytest
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
