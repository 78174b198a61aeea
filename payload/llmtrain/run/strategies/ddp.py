"""Distributed data parallel."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmtrain.run.strategies.averaging import Averaging
from llmtrain.run.strategies.protocol import DTYPES
from llmtrain.run.strategies.random_state import read_random_state, write_random_state

FILE = "trainable.safetensors"


class Ddp(Averaging):
    """DDP: every rank holds the whole model; gradients are averaged."""

    name = "ddp"

    def wrapped(self) -> Any:
        return torch.nn.parallel.DistributedDataParallel(self.model.to(self.device))

    def synchronized(self, last: bool) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = nullcontext() if last else self.module.no_sync()
        return context

    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        dtype, enabled = DTYPES[self.precision], self.precision != "fp32"
        with torch.autocast(self.device.type, dtype, enabled=enabled):
            return what(self.module)

    def write(self, folder: Path) -> None:
        """All ranks hold the same state, so one rank of each node writes it."""
        if int(os.environ["LOCAL_RANK"]) == 0:
            save_file(self.adamw.tensors(), folder / FILE)
        write_random_state(folder, self.device)

    def read(self, folder: Path, world_size: int) -> str:
        self.adamw.restore(load_file(folder / FILE))
        return read_random_state(folder, self.device, world_size)

    def right(self, evidence: dict[str, Any]) -> bool:
        return bool(
            evidence["engine"] == "DistributedDataParallel" and evidence["parameters"] == evidence["of"]
        )
