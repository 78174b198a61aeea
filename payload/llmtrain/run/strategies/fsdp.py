"""Fully sharded data parallel, torch's second version."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmtrain.run.collectives import together
from llmtrain.run.strategies.averaging import Averaging
from llmtrain.run.strategies.protocol import DTYPES, is_a_part
from llmtrain.run.strategies.random_state import read_random_state, write_random_state
from llmtrain.run.strategies.shards import Shards, part, write_shard


class Fsdp(Averaging):
    """FSDP2: every rank holds its shard of each parameter, and of AdamW's moments."""

    name = "fsdp"

    def wrapped(self) -> Any:
        """The model, sharded layer by layer, with products in the job's precision and gradients reduced in float32."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[self.precision], reduce_dtype=torch.float32)
        layers = self.model._no_split_modules or []
        for module in list(self.model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        return fully_shard(self.model, mesh=mesh, mp_policy=policy)

    def synchronized(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        return what(self.module)

    def write(self, folder: Path) -> None:
        tensors = self.adamw.tensors()
        rows = self.adamw.rows()
        starts = {name: part(rows[name], self.rank, self.world_size)[0] for name in tensors if name in rows}
        write_shard(folder, self.rank, tensors, starts)
        write_random_state(folder, self.device)

    def read(self, folder: Path, world_size: int) -> str:
        shards = Shards(folder, world_size)
        rows = self.adamw.rows()

        def mine(name: str) -> torch.Tensor:
            """This rank's part of a tensor, now."""
            if name not in rows:
                return shards.whole(name)
            return shards.rows(name, *part(rows[name], self.rank, self.world_size))

        self.adamw.restore(together(lambda: {name: mine(name) for name in shards.parts}))
        return read_random_state(folder, self.device, world_size)

    def right(self, evidence: dict[str, Any]) -> bool:
        return evidence["engine"].startswith("FSDP") and is_a_part(evidence, self.world_size)
