"""One of two ranks under DeepSpeed's ZeRO: prints gradient norms as JSON for each requested stage; stage 0 is
DistributedDataParallel. `zero_norms.py MEETING RANK STAGE…`
"""

import json
import os
import sys
from typing import Any

import torch
from llama import batch, llama

from llmtrain.run.health import Norms, gradient_norms
from llmtrain.run.train import leave_process_groups


def of(stage: int, rank: int) -> tuple[Norms, int]:
    """The norms, and the stage that the engine reports."""
    model, ids = llama(), batch()[rank : rank + 1]
    if stage == 0:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        return gradient_norms(model), 0
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.AdamW(model.parameters())
    )
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    return gradient_norms(model), int(engine.zero_optimization_stage())


def main(meeting: str, rank: int, stages: list[int]) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
    }
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler
    deepspeed.init_distributed("gloo", verbose=False)
    for stage in stages:
        norms, ran = of(stage, rank)
        print(
            "norms",
            json.dumps([ran, {f"{kind} {block}": norm for (kind, block), norm in norms.cells.items()}]),
        )
    leave_process_groups()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(stage) for stage in sys.argv[3:]])
