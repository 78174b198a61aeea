"""The documentation of the modules, as `ansible-doc` reads it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

MODULES = sorted((Path(__file__).parents[3] / "plugins/modules").glob("[!_]*.py"))
FIELDS = {
    "description",
    "type",
    "required",
    "default",
    "choices",
    "elements",
    "suboptions",
    "returned",
    "contains",
    "sample",
}


def documented(module: Path) -> dict[str, Any]:
    """DOCUMENTATION and RETURN of a module, parsed."""
    return {
        statement.targets[0].id: yaml.safe_load(str(statement.value.value))
        for statement in ast.parse(module.read_text()).body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id in ("DOCUMENTATION", "RETURN")
        and isinstance(statement.value, ast.Constant)
    }


def entries(level: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every option or return value with the ones below it, by dotted name."""
    for name, entry in level.items():
        yield above + name, entry
        for below in ("suboptions", "contains"):
            yield from entries(entry.get(below, {}), f"{above}{name}.")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_description_ends_at_an_unquoted_comma(module: Path) -> None:
    """In `{description: How, and when}` YAML reads "and when" as a field of its own."""
    found = documented(module)
    levels = (found["DOCUMENTATION"].get("options", {}), found.get("RETURN") or {})
    unknown = {
        name: extra for level in levels for name, entry in entries(level) if (extra := entry.keys() - FIELDS)
    }
    assert not unknown
