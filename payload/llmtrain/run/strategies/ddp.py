"""Distributed data parallel."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from safetensors.torch import load_file, save_file

from llmtrain.job import Optim
from llmtrain.run.batches import Batch
from llmtrain.run.strategies.adamw import AdamW, held, unsharded
from llmtrain.run.strategies.protocol import DTYPES, gather
from llmtrain.run.strategies.random_state import read_random_state, write_random_state

FILE = "trainable.safetensors"


class Ddp:
    """DDP: every rank holds the whole model; gradients are averaged."""

    name = "ddp"

    def __init__(self, model: Any, optim: Optim, precision: str, device: torch.device) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.module: Any = torch.nn.parallel.DistributedDataParallel(model.to(device))
        self.adamw = AdamW(model, optim, precision, device)

    def synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged after the last batch of a step alone."""
        context: AbstractContextManager[Any] = nullcontext() if last else self.module.no_sync()
        return context

    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        dtype, enabled = DTYPES[self.precision], self.precision != "fp32"
        with torch.autocast(self.device.type, dtype, enabled=enabled):
            return what(self.module)

    def learn(
        self, batches: list[Batch], learned: int, lr: float, look: Callable[[], None]
    ) -> tuple[torch.Tensor, float]:
        # DDP takes the mean of gradients over ranks; this weight makes of it the mean over positions.
        weight = self.world_size / learned
        return self.adamw.learn(
            batches, lambda each: self.computed(each.loss), self.synchronized, weight, lr, look
        )

    @property
    def scale(self) -> float | None:
        return self.adamw.scale

    @property
    def scale_of_gradients(self) -> float:
        return 1.0

    def write(self, folder: Path) -> None:
        """All ranks hold the same, so one of each node writes it."""
        if int(os.environ["LOCAL_RANK"]) == 0:
            save_file(self.adamw.tensors(), folder / FILE)
        write_random_state(folder, self.device)

    def read(self, folder: Path, world_size: int) -> str:
        self.adamw.restore(load_file(folder / FILE))
        return read_random_state(folder, self.device, world_size)

    def gathered(self, wanted: Callable[[Any], bool]) -> dict[str, torch.Tensor]:
        return gather(self.model, wanted, unsharded)

    def evidence(self) -> dict[str, Any]:
        return held(self.module, self.model)

    def right(self, evidence: dict[str, Any]) -> bool:
        return bool(
            evidence["engine"] == "DistributedDataParallel" and evidence["parameters"] == evidence["of"]
        )
