"""`llmkeep model add` as a test calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmkeep import cli


def run(capsys: pytest.CaptureFixture[str], source: object, into: Path, *words: object) -> tuple[int, str]:
    """Exit code and output, with the licence of the tiny model accepted."""
    given = (
        [*map(str, words)]
        if "--accept-licence" in words
        else ["--accept-licence", "deepseek", *map(str, words)]
    )
    capsys.readouterr()
    code = cli.main(["model", "add", str(source), "--into", str(into), *given])
    said = capsys.readouterr()
    return code, said.out + said.err


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def provenance(candidate: Path) -> dict[str, Any]:
    """What a candidate says of its origin."""
    (path,) = candidate.glob("models/*/provenance.json")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
