"""A process that saves in a loop until it is killed; a rank of a gloo group where RANK, WORLD_SIZE and MEETING (a file)
are set, with LOCAL_RANK and GROUP_RANK as torchrun has them.

`saver.py DIRECTORY SAVES [SIZE]`: it says the step that it resumes from, and each step whose save has returned.
"""

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

from llmtrain.checkpoint import Checkpoint, Checkpoints

KEY = bytes(range(32))


def content(step: int, rank: int, size: int) -> dict[str, bytes]:
    """The files that a rank writes at a step: three, of which one is in a folder."""
    chance = random.Random(f"{step} {rank}")
    return {
        f"rank{rank}.pt": chance.randbytes(size),
        f"tag/rank{rank}.safetensors": chance.randbytes(size // 3),
        f"rng{rank}": chance.randbytes(100),
    }


def write(folder: Path, step: int, rank: int = 0, size: int = 100_000) -> None:
    """In several writes a file, so that a kill can come between."""
    for name, data in content(step, rank, size).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(data), 1 << 14):
                file.write(data[at : at + (1 << 14)])


def is_whole(found: Checkpoint, ranks: int, size: int = 100_000) -> bool:
    """Whether these ranks' files of its step are there, each as it was written."""
    return found.state == {"cursor": found.step * 7} and all(
        (found.folder / name).read_bytes() == data
        for rank in range(ranks)
        for name, data in content(found.step, rank, size).items()
    )


def main(directory: Path, saves: int, size: int = 100_000) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        import torch.distributed

        torch.distributed.init_process_group(
            "gloo", f"file://{os.environ['MEETING']}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
        )
    checkpoints = Checkpoints(directory / os.environ.get("GROUP_RANK", ""), KEY, last=2)
    found = checkpoints.latest_good()
    step = found.step if found else 0
    print(json.dumps({"resumed": step}), flush=True)
    for number in range(step + 1, step + 1 + saves):
        checkpoints.save(number, partial(write, step=number, rank=rank, size=size), {"cursor": number * 7})
        print(number, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
