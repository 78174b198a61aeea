"""Benchmarks start, and the short ones measure: what a release renames, they call by its new name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_modules import ROOT

PAYLOAD = ROOT / "payload/.venv/bin/python"
COMMANDS = sorted(
    path
    for pattern in ("*.py", "serving/*.py")
    for path in (ROOT / "bench").glob(pattern)
    if "ArgumentParser(" in path.read_text()
)
SHORT = {
    "audit.py": ["--seconds", "0.2", "--rounds", "1", "--writers", "1", "--json"],
    "feedback.py": ["--seconds", "0.2", "--rounds", "1", "--connections", "1", "--json"],
    "gateway.py": ["--seconds", "0.2", "--rounds", "1", "--connections", "1", "--remote", "--json"],
    "routing.py": ["--seconds", "2", "--traffic", "chats", "--json"],
}


def output(path: Path, *words: str) -> str:
    """What a benchmark prints, run by the environment that it is written for."""
    python = (
        PAYLOAD if "\nimport torch" in path.read_text() or path.parent.name == "serving" else sys.executable
    )
    done = subprocess.run(
        [python, path, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_says_what_it_takes(path: Path) -> None:
    assert output(path, "--help").startswith("usage: ")


@pytest.mark.parametrize("name", SHORT)
def test_measures(name: str) -> None:
    assert json.loads(output(ROOT / "bench" / name, *SHORT[name]))
