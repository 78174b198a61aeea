"""Two steps under DeepSpeed's ZeRO in one process, on a host without a compiler, for each configuration: `[{"config": …,
"environment": …}, …]` on standard input. Prints a line of JSON for each: the optimizer's class and the losses, or the refusal.
`zero_without_compiler.py MEETING < CASES`
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from llama import batch, llama

from llmtrain.exits import Refusal
from llmtrain.run.train import leave_process_groups, start_process_group


def ran(config: dict[str, Any]) -> tuple[str, list[float]]:
    """The optimizer's class, and the losses of two steps."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=llama(), config=config)
    losses = []
    for _ in range(2):
        loss = engine(input_ids=batch(), labels=batch()).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    inner = type(engine.optimizer.optimizer)
    return f"{inner.__module__}.{inner.__name__}", losses


def main(meeting: str) -> None:
    cases = json.load(sys.stdin)
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=0, world_size=1)
    setup: Any = SimpleNamespace(deepspeed=cases[0]["config"])
    start_process_group(setup, "gloo")
    for case in cases:
        os.environ |= case["environment"]
        try:
            print("case", json.dumps(ran(case["config"])))
        except (Refusal, RuntimeError) as error:  # DeepSpeed wraps what its pinned memory raises
            print("case", json.dumps([str(error.__cause__ or error), []]))
    leave_process_groups()


if __name__ == "__main__":
    main(sys.argv[1])
