"""Filters of the role kubernetes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def folder_tree(folder: str, place: str) -> dict[str, list[dict[str, Any]]]:
    """A folder of text files on the controller, as directories and files of config_tree below PLACE."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    directories = {place, *(f"{place}/{each.relative_to(folder).parent}" for each in files)}
    return {
        "directories": [{"path": each.removesuffix("/."), "exclusive": True} for each in sorted(directories)],
        "files": [
            {"dest": f"{place}/{each.relative_to(folder)}", "content": each.read_text()} for each in files
        ],
    }


class FilterModule:
    """Ansible looks for this class."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"folder_tree": folder_tree}
