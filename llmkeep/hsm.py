"""The roles' PKCS#11 library, for keys that this machine signs with: the rules of logins have one home."""

from typing import Any

from llmkeep import source_tree


def pkcs11_signatures() -> Any:
    """The module `signature` of the tree's module_utils."""
    return source_tree.plugin("module_utils.hsm.signature")
