"""The roles' PKCS#11 library, for keys that this machine signs with: the rules of logins have one home."""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmkeep import source_tree


def pkcs11_signatures() -> Any:
    """The module `signature` of the tree's module_utils, imported as Ansible does."""
    # The tree is what was signed: nothing is written into it.
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory(prefix="llmkeep-") as folder:
        collection = Path(folder, "ansible_collections/llmkeep/estate")
        collection.parent.mkdir(parents=True)
        collection.symlink_to(source_tree.located())
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(
                "ansible_collections.llmkeep.estate.plugins.module_utils.hsm.signature"
            )
        finally:
            sys.path.remove(folder)
