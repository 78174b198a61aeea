"""Programs are files that linters read: roles carry none in their YAML, and what scenarios break by shell is shell."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT

ROLE_FILES = sorted((ROOT / "roles").rglob("*.yml"))
SCENARIOS = sorted((ROOT / "molecule").rglob("*.yml"))
INTERPRETER = re.compile(r"(ba)?sh|python3")
# In a list of YAML, and in a list of an expression.
LOOKUP = "{{ lookup('ansible.builtin.file', "
JINJA_STATEMENT = re.compile(r"\{%-? *(set|for|if)\b")
IN_EXPRESSION = re.compile(r"'((ba)?sh|python3)', '-[a-z]*c',\s+(?!\s|lookup\('ansible\.builtin\.file', )")


def lists(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list):
        yield value
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else []:
        yield from lists(each)


def programs(path: Path) -> list[str]:
    """What a YAML file hands to an interpreter: the word after -c, by whatever the interpreter is called."""
    found = []
    for words in lists(yaml.safe_load(path.read_text())):
        for name, option, program in zip(words, words[1:], words[2:], strict=False):
            if INTERPRETER.fullmatch(str(name)) and re.fullmatch(r"-[a-z]*c", str(option)):
                found.append(str(program))
    return found


@pytest.mark.parametrize("path", ROLE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_role_s_program_is_a_file(path: Path) -> None:
    inline = [program for program in programs(path) if not program.startswith(LOOKUP)]
    assert not inline, "move it to the role's files/, with its extension"
    assert not IN_EXPRESSION.search(path.read_text())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "roles").glob("*/vars/*.yml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_variables_are_data_and_no_jinja_program(path: Path) -> None:
    assert not JINJA_STATEMENT.search(path.read_text())


@pytest.mark.parametrize("folder", ["roles", "playbooks", "molecule"])
def test_no_template_collects_in_a_loop(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".yml", ".j2"}]
    found = [path for path in paths if re.search(r"set _ =|namespace\(", path.read_text())]
    assert not found, "write a filter in plugins/filter"


def test_shell_of_scenarios_passes_shellcheck(tmp_path: Path) -> None:
    number = 0
    for path in SCENARIOS:
        for program in programs(path):
            if "{{" not in program and not program.startswith("import "):
                number += 1
                (tmp_path / f"{path.parent.name}-{number}.sh").write_text(program)
    # SC2016: what a mutation writes into a file is often another program's variable.
    argv = ["shellcheck", "--shell=sh", "--exclude=SC2016", *map(str, sorted(tmp_path.iterdir()))]
    checked = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert number > 20
    assert checked.returncode == 0, checked.stdout
