"""A run of all checks, on record, and its report."""

import argparse
import json
from pathlib import Path

from llmkeep.playbooks import Heard, play
from llmkeep.record import runs


def run(
    tree: Path,
    inventories: list[Path],
    arguments: argparse.Namespace,
    words: list[str],
    report: Path,
    quiet: bool = False,
) -> tuple[int, Heard]:
    """Run playbooks/verify.yml with WORDS for Ansible; returns its exit code and what was heard.

    REPORT is written where the checks were run to their end, and is not there otherwise.
    """
    report.unlink(missing_ok=True)
    playbook = tree / "playbooks/verify.yml"
    words = [*words, "--extra-vars", json.dumps({"verify_report": str(report)})]
    with runs.recorded(tree, playbook.resolve(), inventories, arguments) as outcome:
        code, heard = play(playbook, inventories, words, quiet=quiet)
        outcome.code, outcome.hosts = code, heard.hosts
        if report.exists():
            document = json.loads(report.read_text())
            outcome.not_enforceable = document.get("not_enforceable", [])
            outcome.accepted = document.get("accepted", [])
            runs.note(runs.VERIFIED, tree, arguments, document)
    return code, heard
