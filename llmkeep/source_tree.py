"""Location of the tree with playbooks, roles and policy: this code's checkout, or the tree from the bundle."""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmkeep.errors import LlmkeepError

TREE = Path(__file__).resolve().parent.parent
INSTALLED = Path("/opt/llmkeep/tree")


class NoTree(LlmkeepError):
    """There is no tree to run playbooks from. The message names the places and what to do."""


def located() -> Path:
    """The tree whose playbooks are run: this checkout, or the tree from the bundle."""
    for place in (TREE, INSTALLED):
        if (place / "site.yml").is_file():
            return place
    raise NoTree(
        f"neither {TREE} nor {INSTALLED} has a site.yml: run bootstrap from the medium, or work in a checkout"
    )


def tracked(tree: Path, exclude: list[str]) -> list[str]:
    """The working tree's files that git tracks and that go to an estate."""
    run = subprocess.run(
        ["git", "-C", str(tree), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise LlmkeepError(
            f"{tree} is not a git checkout, so the files of the tree are unknown: {run.stderr.strip()}"
        )
    outside = tuple(f"{folder}/" for folder in exclude)
    names = [name for name in run.stdout.split("\0") if name and not name.startswith(outside)]
    return [name for name in names if (tree / name).exists()]


def plugin(name: str) -> Any:
    """A module of the tree's plugins, such as `filter.cuda`, imported as Ansible does."""
    # The tree is what was signed: nothing is written into it.
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory(prefix="llmkeep-") as folder:
        collection = Path(folder, "ansible_collections/llmkeep/estate")
        collection.parent.mkdir(parents=True)
        collection.symlink_to(located())
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(f"ansible_collections.llmkeep.estate.plugins.{name}")
        finally:
            sys.path.remove(folder)
