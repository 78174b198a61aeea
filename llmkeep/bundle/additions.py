"""artifacts.d/*.yml: an estate's additions to artifacts.yml, made without changing llmkeep's own tree.

A file may add sources, roles, profiles and models with new names, packages to an existing role, the packages that
hosts have installed (written by `llmkeep packages list`), and values that a source leaves empty, such as a
fingerprint. Names already in use, unknown keys and any other part of artifacts.yml are refused.
"""

import copy
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import LlmkeepError

FOLDER, LOCK = "artifacts.d", "lock.yml"
# The role of the packages that hosts have, in each profile, and the only one of which some may be in no source.
INSTALLED = "installed"
SOURCE = {
    "uri", "suites", "components", "key", "fingerprint", "directory", "files", "packages", "replaces_debian", "licence",
}  # fmt: skip
PROFILE = {"include", "sources", "roles", "models", "programs", "driver_sets", "licences", "environments"}
MODEL = {"wheel", "member", "folder", "licence"}


class AdditionsRefused(LlmkeepError):
    """A file of artifacts.d cannot be used."""


def paths(tree: Path) -> list[Path]:
    """The files with additions, sorted by name."""
    return sorted(path for path in (tree / FOLDER).glob("*.yml") if path.name != LOCK)


def every_file(tree: Path) -> Iterator[Path]:
    """All files of artifacts.d, keys, locks and packages included."""
    yield from sorted(path for path in (tree / FOLDER).rglob("*") if path.is_file())


def merged(catalogue: dict[str, Any], tree: Path) -> dict[str, Any]:
    """The content of artifacts.yml with all additions; AdditionsRefused names the file, the value and what to do."""
    result = copy.deepcopy(catalogue)
    for path in paths(tree):
        name = f"{FOLDER}/{path.name}"
        try:
            document = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise AdditionsRefused(f"{name} is not YAML: {error}") from error
        known(document, {"apt", "profiles", "models"}, name)
        apt = document.get("apt") or {}
        known(apt, {"sources", "roles", INSTALLED}, f"{name}, apt")
        for kind, added, taken, keys in (
            ("source", apt.get("sources"), result["apt"]["sources"], SOURCE),
            ("profile", document.get("profiles"), result["profiles"], PROFILE),
            ("model", document.get("models"), result["models"], MODEL),
        ):
            for each, entry in (added or {}).items():
                known(entry, keys, f"{name}, {kind} {each}")
                if each in taken and any(taken[each].get(key) != "" for key in entry):
                    raise AdditionsRefused(
                        f"{name} adds the {kind} {each}, which already exists: choose another name"
                    )
                taken[each] = {**taken.get(each, {}), **entry}
        roles = (apt.get("roles") or {}) | ({INSTALLED: apt[INSTALLED]} if INSTALLED in apt else {})
        for role, packages in roles.items():
            if not isinstance(packages, list):
                raise AdditionsRefused(f"{name} gives the role {role} {packages!r}: write a list of packages")
            before = result["apt"]["roles"].setdefault(role, [])
            before += [package for package in packages if package not in before]
    return result


def known(entry: Any, keys: Iterable[str], where: str) -> None:
    """Refuse anything but a mapping with known keys."""
    if not isinstance(entry, dict):
        raise AdditionsRefused(f"{where} is {entry!r}: write a mapping of {', '.join(sorted(keys))}")
    for key in sorted(set(entry) - set(keys), key=str):
        near = difflib.get_close_matches(str(key), list(keys), n=1)
        hint = f"did you mean {near[0]}?" if near else f"take one of {', '.join(sorted(keys))}"
        raise AdditionsRefused(f"{where} has the unknown key {key}; {hint}")
