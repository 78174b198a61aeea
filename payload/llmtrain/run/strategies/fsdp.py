"""Fully sharded data parallel, torch's second version."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmtrain.exits import FAILED, Refusal
from llmtrain.run.strategies.averaging import Averaging
from llmtrain.run.strategies.protocol import DTYPES, is_a_part
from llmtrain.run.strategies.random_state import read_random_state, write_random_state


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
        for part in list(self.model.modules()):
            if type(part).__name__ in layers:
                fully_shard(part, mesh=mesh, mp_policy=policy)
        return fully_shard(self.model, mesh=mesh, mp_policy=policy)

    def synchronized(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        return what(self.module)

    def write(self, folder: Path) -> None:
        save_file(self.adamw.tensors(), folder / shard_name(self.rank))
        write_random_state(folder, self.device)

    def read(self, folder: Path, world_size: int) -> str:
        if world_size == self.world_size:
            self.adamw.restore(load_file(folder / shard_name(self.rank)))
            return read_random_state(folder, self.device, world_size)
        files = [folder / shard_name(rank) for rank in range(world_size)]
        if not all(file.is_file() for file in files):
            raise Refusal(
                f"{folder} was saved by {world_size} ranks on several nodes, but {self.world_size} ranks run now, and shards "
                "cannot be collected from other nodes: resume with as many ranks as saved it",
                FAILED,
            )
        shards = [load_file(file) for file in files]
        self.adamw.restore(
            {name: self.resharded(name, [each[name] for each in shards]) for name in shards[0]}
        )
        return read_random_state(folder, self.device, world_size)

    def resharded(self, name: str, shards: list[torch.Tensor]) -> torch.Tensor:
        """This rank's shard of a tensor, from the shards of another number of ranks."""
        if name.endswith("/step") or name == "scaler":
            return shards[0]
        parts = torch.cat(shards).chunk(self.world_size)
        return parts[self.rank] if self.rank < len(parts) else parts[0][:0]

    def right(self, evidence: dict[str, Any]) -> bool:
        return evidence["engine"].startswith("FSDP") and is_a_part(evidence, self.world_size)


def shard_name(rank: int) -> str:
    """The file of a rank in a checkpoint."""
    return f"shard-{rank:05d}.safetensors"
