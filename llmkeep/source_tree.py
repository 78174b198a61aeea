"""Where the tree with playbooks, roles and policy lies: the checkout that this code is in, or what the bundle brought."""

from pathlib import Path

from llmkeep.errors import LlmkeepError

TREE = Path(__file__).resolve().parent.parent
INSTALLED = Path("/opt/llmkeep/tree")


class NoTree(LlmkeepError):
    """There is no tree to run playbooks from. The message names the places and the way out."""


def located() -> Path:
    """The tree whose playbooks are run: this checkout, or what the bundle brought."""
    for place in (TREE, INSTALLED):
        if (place / "site.yml").is_file():
            return place
    raise NoTree(
        f"neither {TREE} nor {INSTALLED} has a site.yml: run bootstrap from the stick, or work in a checkout"
    )
