"""Filters of the role kubernetes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def folder_tree(folder: str, place: str) -> dict[str, list[dict[str, Any]]]:
    """A folder of text files on the controller, as directories and files of config_tree below PLACE."""
    paths = sorted(Path(folder).rglob("*"))
    places = {path: f"{place}/{path.relative_to(folder)}" for path in paths}
    directories = [place, *(places[path] for path in paths if path.is_dir())]
    return {
        "directories": [{"path": each, "exclusive": True} for each in directories],
        "files": [{"dest": places[path], "content": path.read_text()} for path in paths if path.is_file()],
    }


class FilterModule:
    """Ansible looks for this class."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"folder_tree": folder_tree}
