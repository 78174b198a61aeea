"""All parts of llmkeep have one version, and its program says which."""

from pathlib import Path

import pytest

from changelogs.release import versions
from llmkeep import cli

ROOT = Path(__file__).parents[2]
VERSIONS = versions(ROOT)


def test_each_part_has_the_collections_version() -> None:
    assert set(VERSIONS.values()) == {VERSIONS["galaxy.yml"]}, VERSIONS


def test_the_program_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llmkeep {VERSIONS['galaxy.yml']}\n"
