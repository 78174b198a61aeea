"""The common part of the strategies that use AdamW and average gradients over ranks: DDP and FSDP2."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as distributed

from llmtrain.job import Optim
from llmtrain.run.batches import Batch
from llmtrain.run.strategies.adamw import AdamW, evidence_of, unsharded
from llmtrain.run.strategies.protocol import gather


class Averaging(ABC):
    """A model on all ranks, distributed by `wrapped`, and its optimizer."""

    scale_of_gradients = 1.0

    def __init__(self, model: Any, optim: Optim, precision: str, device: torch.device) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.module: Any = self.wrapped()
        self.adamw = AdamW(model, optim, precision, device)

    @abstractmethod
    def wrapped(self) -> Any:
        """The model wrapped by torch's strategy."""

    @abstractmethod
    def synchronized(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged only after the last batch of a step."""

    @abstractmethod
    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Something computed of the module, in the job's precision."""

    def learn(
        self, batches: list[Batch], learned: int, lr: float, look: Callable[[], None]
    ) -> tuple[torch.Tensor, float]:
        # The mean of gradients over ranks is taken; this weight makes of it the mean over positions.
        weight = self.world_size / learned
        return self.adamw.learn(
            batches, lambda each: self.computed(each.loss), self.synchronized, weight, lr, look
        )

    @property
    def scale(self) -> float | None:
        return self.adamw.scale

    def gathered(self, predicate: Callable[[Any], bool]) -> dict[str, torch.Tensor]:
        return gather(self.model, predicate, unsharded)

    def evidence(self) -> dict[str, Any]:
        return evidence_of(self.module, self.model)
