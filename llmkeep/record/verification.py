"""A run of all checks, on record, and its report."""

import argparse
import json
from pathlib import Path

from llmkeep.playbooks import RunResults, play
from llmkeep.record import runs


def run(
    tree: Path,
    inventories: list[Path],
    arguments: argparse.Namespace,
    words: list[str],
    report: Path,
    quiet: bool = False,
) -> tuple[int, RunResults]:
    """Run playbooks/verify.yml with WORDS for Ansible; returns its exit code and results.

    REPORT is written if the checks completed, and does not exist otherwise.
    """
    report.unlink(missing_ok=True)
    playbook = tree / "playbooks/verify.yml"
    words = [*words, "--extra-vars", json.dumps({"verify_report": str(report)})]
    with runs.recorded(tree, playbook.resolve(), inventories, arguments) as outcome:
        code, results = play(playbook, inventories, words, quiet=quiet)
        outcome.code, outcome.hosts = code, results.hosts
        if report.exists():
            document = json.loads(report.read_text())
            outcome.not_enforceable = document.get("not_enforceable", [])
            outcome.accepted = document.get("accepted", [])
            runs.note(runs.VERIFIED, tree, arguments, document)
    return code, results
