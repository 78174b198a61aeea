"""Import the collection's modules as Ansible does: through the link that makes the tree a collection."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests/helpers"
LINK = ROOT / ".ansible/collections/ansible_collections/llmkeep/estate"


def load(name: str) -> ModuleType:
    """plugins/modules/NAME.py as a Python module."""
    if not LINK.exists():
        LINK.parent.mkdir(parents=True, exist_ok=True)
        LINK.symlink_to(ROOT)
    folder = str(LINK.parents[2])
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"ansible_collections.llmkeep.estate.plugins.{name}")
