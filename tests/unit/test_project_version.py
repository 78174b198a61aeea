"""All parts of llmkeep have one version, and its program says which."""

import tomllib
from pathlib import Path

import pytest
import yaml

from llmkeep import cli

ROOT = Path(__file__).parents[2]
VERSION = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]


@pytest.mark.parametrize("part", [".", "lab", "llmcore", "llmproof", "payload"])
def test_a_part_has_the_collections_version(part: str) -> None:
    project = tomllib.loads((ROOT / part / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_the_program_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llmkeep {VERSION}\n"
