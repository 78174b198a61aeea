"""What `llm-train publish` makes: a release candidate, of a few small files."""

import hashlib
import json
from pathlib import Path

NAME = "sql-2026-11"
MODEL = f"models/{NAME}"
BASE, LEARNED = "1" * 64, "2" * 64  # sha256 of manifests
VERDICT = {
    "verdict": "promote",
    "old": {"model": BASE, "adapter": None},
    "new": {"model": BASE, "adapter": LEARNED},
}


def candidate(folder: Path, content: bytes = b"\1" * 5000, name: str = NAME, **published: object) -> Path:
    """What `llm-train publish` makes: a whole model with its card, and its manifest beside it."""
    model = folder / "models" / name
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(content)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "LICENSE").write_text("do what you like\n")
    (model / "README.md").write_text("# a card\n")
    (model / "verdict.json").write_text(json.dumps(VERDICT))
    told: dict[str, object] = {
        "base": BASE,
        "learned": LEARNED,
        "merged": {"prompts": 4},
        "licence": "MIT",
        "verdict": "promote",
    }
    told |= published
    (model / "training.json").write_text(json.dumps({"published": told}))
    summed(folder, name)
    return folder


def summed(folder: Path, name: str = NAME) -> None:
    """Write the model's manifest of what lies there now."""
    model = folder / "models" / name
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(model.iterdir())
    ]
    (folder / "models" / f"{name}.sha256").write_text("".join(lines))
