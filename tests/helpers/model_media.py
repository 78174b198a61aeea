"""A tiny candidate, and what tests do with its media."""

from pathlib import Path

import sharded_deepseek

from llmkeep.models import intake, licence
from llmkeep.models.folder import Folder

NAME = "deepseek-tiny"
SUMS = f"models/{NAME}.sha256"
SHARDS = [f"models/{NAME}/model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
SIZE = 150_000  # of a medium: the largest shard has 70 kB, and two are enough


def candidate(folder: Path) -> Path:
    """FOLDER/candidate, as `llmkeep model add` makes it."""

    def accept(found: licence.Licence, _: str) -> dict[str, str]:
        return licence.accepted(found, "deepseek", "tester", "2026-11-27T00:00:00+00:00")

    intake.add(Folder(sharded_deepseek.write(folder / "DeepSeek-Tiny")), folder / "candidate", None, accept)
    return folder / "candidate"


def lose_a_shard(part: Path) -> None:
    """Remove the second shard from the medium that has it."""
    next(part.glob("models/*/model-00002*")).unlink()
