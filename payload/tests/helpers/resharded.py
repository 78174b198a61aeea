"""Checkpoints of a tiny Llama, each read by another number of ranks than wrote it: `resharded.py FOLDER CASES`. CASES is JSON,
`{"STRATEGY": DEEPSPEED'S CONFIGURATION BY NUMBER OF RANKS, or null}`; the saves that `SAVES` names are FOLDER/STRATEGY/NAME.

Ranks are forks of this process, which has imported everything.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed  # noqa: F401
from llama import batch, llama

from llmtrain.job import Optim
from llmtrain.run.strategies.fsdp import Fsdp
from llmtrain.run.strategies.zero import Zero
from llmtrain.run.train import leave_process_groups, start_process_group

CPU = torch.device("cpu")
# Name, number of ranks, and the save that they read with its number of ranks; without one, they take two steps.
TWO_AND_ONE = [("2", 2, None), ("1", 1, ("2", 2))]
AGAIN = [("2-again", 2, ("1", 1))]
SAVES: dict[str, list[Any]] = {
    "zero2": TWO_AND_ONE,
    "zero3": [*TWO_AND_ONE, *AGAIN, ("3-of-zero2", 3, ("../zero2/2", 2))],
    "fsdp": [*TWO_AND_ONE, *AGAIN],
}


def started(config: dict[str, Any] | None) -> Any:
    """The strategy of these ranks; the first layer is frozen, and its weights differ between saves."""
    model = llama()
    model.model.layers[0].requires_grad_(False)
    return Zero(model, "bf16", CPU, config, None) if config else Fsdp(model, Optim(), "bf16", CPU)


def rank(number: int, size: int, folder: Path, config: dict[str, Any] | None, save: str, read: Any) -> None:
    """Write one save as rank `number` of `size`, after two steps or after reading another."""
    ranks = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.distributed.init_process_group(
        "gloo", f"file://{folder / save}.meeting", rank=number, world_size=size
    )
    if config:
        setup: Any = SimpleNamespace(deepspeed=config)
        start_process_group(setup, "gloo")
    strategy = started(config)
    if read:
        strategy.read(folder / read[0], read[1])
    else:
        loss = SimpleNamespace(loss=lambda module: module(input_ids=batch(), labels=batch()).loss)
        for _ in range(2):
            strategy.learn([loss], size, 1e-2, lambda: None)
    strategy.write(folder / save)
    del strategy
    leave_process_groups()


def main(folder: Path, cases: dict[str, Any]) -> int:
    for name, configs in cases.items():
        for save, size, read in SAVES[name]:
            (folder / name / save).mkdir(parents=True)
            children = []
            for number in range(size):
                child = os.fork()
                if child == 0:
                    try:
                        rank(number, size, folder / name, configs and configs[str(size)], save, read)
                    except BaseException:
                        sys.excepthook(*sys.exc_info())
                        os._exit(1)
                    os._exit(0)
                children.append(child)
            statuses = [os.waitpid(child, 0)[1] for child in children]
            if any(statuses):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
