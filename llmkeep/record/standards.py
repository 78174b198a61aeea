"""Standards: the checks for each control. The data are controls/*.yml of the tree; docs/audit/controls.md describes them."""

from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import LlmkeepError

FOLDER, CHECKS = "controls", "checks.yml"


def names(tree: Path) -> list[str]:
    """The standards that the tree has."""
    return sorted(path.stem for path in (tree / FOLDER).glob("*.yml") if path.name != CHECKS)


def read(tree: Path, name: str) -> dict[str, Any]:
    """A standard, with its `id` and its controls; LlmkeepError for one that the tree does not have."""
    if name not in names(tree):
        raise LlmkeepError(f"there is no standard {name!r}: choose one of {', '.join(names(tree))}")
    standard: dict[str, Any] = yaml.safe_load((tree / FOLDER / f"{name}.yml").read_text())
    return {"id": name, **standard}


def conditional(tree: Path) -> list[str]:
    """Checks that a role runs only for some settings, sorted."""
    checks: dict[str, list[str]] = yaml.safe_load((tree / FOLDER / CHECKS).read_text())
    return sorted(checks["conditional"])
