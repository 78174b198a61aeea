"""The interface between the training loop and a strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as distributed

from llmtrain.exits import FAILED, Refusal
from llmtrain.run.batches import Batch
from llmtrain.run.collectives import gathered

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Strategy(Protocol):
    """A model and its optimizer, spread over the ranks of a job. All ranks call the same methods in the same order."""

    name: str  # as in scale.strategy
    model: Any  # its trainable parameters have requires_grad
    module: Any  # `model` as it is called in a forward pass
    rank: int
    world_size: int

    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """`what(module)`, such as a batch's summed loss on this rank, in the strategy's precision."""
        ...

    def learn(
        self, batches: list[Batch], learned: int, lr: float, look: Callable[[], None]
    ) -> tuple[torch.Tensor, float]:
        """Take one optimizer step; return this rank's summed loss and the global gradient norm before clipping.

        `learned` is the number of positions that count in this step on all ranks. `look` is called once, after the last
        backward pass and before clipping.
        """
        ...

    @property
    def scale(self) -> float | None:
        """The loss scale in fp16, else None."""
        ...

    @property
    def scale_of_gradients(self) -> float:
        """The factor that gradients still carry when `look` is called."""
        ...

    def write(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint."""
        ...

    def read(self, folder: Path, world_size: int) -> str:
        """Restore a checkpoint that `world_size` ranks wrote; return what could not be restored, "" for nothing.

        Raises Refusal where a checkpoint of that many ranks cannot be read.
        """
        ...

    def gathered(self, predicate: Callable[[Any], bool]) -> dict[str, torch.Tensor]:
        """The wanted parameters by name, unsharded, in the memory of rank 0; {} on the other ranks."""
        ...

    def evidence(self) -> dict[str, Any]:
        """What this rank runs and holds, as JSON."""
        ...

    def right(self, evidence: dict[str, Any]) -> bool:
        """Whether a rank with this evidence runs this strategy."""
        ...


def proven(strategy: Strategy) -> dict[str, Any]:
    """The evidence of all ranks; raises Refusal unless every rank runs the strategy that was asked for."""
    all_evidence = gathered(strategy.evidence())
    for rank, evidence in enumerate(all_evidence):
        if not strategy.right(evidence):
            raise Refusal(
                f"scale.strategy is {strategy.name}, but rank {rank} runs {evidence}; nothing was trained",
                FAILED,
            )
    return {"strategy": strategy.name, "world_size": strategy.world_size, "ranks": all_evidence}


def is_a_part(evidence: dict[str, Any], world_size: int) -> bool:
    """Whether a rank holds about 1/world_size; parameters that cannot be divided evenly leave a little more or less."""
    share: float = evidence["parameters"] * world_size / evidence["of"]
    return 0.8 <= share <= 1.25


def gather(
    model: Any, predicate: Callable[[Any], bool], unsharded: Callable[[Any], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The wanted parameters, each through `unsharded`, on rank 0; {} on the other ranks, which call it, too."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if predicate(parameter):
            tensor = unsharded(parameter)
            if distributed.get_rank() == 0:
                tensors[name] = tensor
    return tensors
