"""The classes that transformers has itself, by model type: `python tests/transformers_classes.py` writes the table.

From the source of the payload's transformers, whose import would take torch.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "llmkeep/models/transformers_classes.txt"
SOURCE = ROOT / "payload/.venv/lib/python3.13/site-packages/transformers/models/auto/modeling_auto.py"
# What engines and embeddings load.
MAPPINGS = {"MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"}


def render() -> str:
    """A line for each model type: the type, then its classes."""
    classes: dict[str, set[str]] = {}
    for node in ast.parse(SOURCE.read_text()).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        if node.targets[0].id in MAPPINGS and isinstance(node.value, ast.Call):
            for kind, found in ast.literal_eval(node.value.args[0]):
                classes.setdefault(kind, set()).update([found] if isinstance(found, str) else found)
    return "".join(f"{kind} {' '.join(sorted(found))}\n" for kind, found in sorted(classes.items()))


if __name__ == "__main__":
    TABLE.write_text(render())
