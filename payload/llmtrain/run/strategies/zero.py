"""DeepSpeed's ZeRO, stages 2 and 3."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from llmtrain.run.batches import Batch
from llmtrain.run.strategies.protocol import gather, is_a_part
from llmtrain.run.strategies.random_state import read_random_state, write_random_state
from llmtrain.run.strategies.zero_state import ZeroState


class Zero:
    """ZeRO: stage 2 shards gradients and AdamW's moments, stage 3 the parameters, too."""

    def __init__(
        self,
        model: Any,
        precision: str,
        device: torch.device,
        config: dict[str, Any],
        alive: Any,
    ) -> None:
        """`config` is DeepSpeed's; `alive` is any object that has to live as long as the model."""
        import deepspeed

        self.model, self.device, self.precision = model, device, precision
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.alive = alive
        self.stage = config["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        trainable = [each for each in model.parameters() if each.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
        self.module: Any = self.engine
        self.state = ZeroState(model, self.engine.optimizer, self.stage, self.rank)

    def computed(self, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        return what(self.engine)

    def learn(
        self, batches: list[Batch], learned: int, lr: float, look: Callable[[], None]
    ) -> tuple[torch.Tensor, float]:
        total = torch.zeros((), device=self.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for number, batch in enumerate(batches):
            loss = self.computed(batch.loss)
            self.engine.backward(loss * (self.world_size / learned), scale_wrt_gas=False)
            if number == len(batches) - 1:
                look()
            self.engine.step()
            total += loss.detach()
        norm = self.engine.get_global_grad_norm()
        return total, float("nan") if norm is None else float(norm)

    @property
    def scale(self) -> float | None:
        return float(self.engine.optimizer.loss_scale) if self.precision == "fp16" else None

    @property
    def scale_of_gradients(self) -> float:
        return self.scale or 1.0

    def write(self, folder: Path) -> None:
        self.state.write(folder)
        write_random_state(folder, self.device)

    def read(self, folder: Path, world_size: int) -> str:
        self.state.read(folder, world_size)
        return read_random_state(folder, self.device, world_size)

    def gathered(self, predicate: Callable[[Any], bool]) -> dict[str, torch.Tensor]:
        return gather(self.model, predicate, self.unsharded)

    def unsharded(self, parameter: Any) -> torch.Tensor:
        """A copy of the whole parameter on the CPU of rank 0; empty on the other ranks."""
        from deepspeed import zero

        with zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().cpu().clone() if self.rank == 0 else torch.empty(0)

    def evidence(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        optimizer = self.engine.optimizer
        if self.stage == 3:
            local_count, of = (
                sum(each.ds_tensor.numel() for each in parameters),
                sum(each.ds_numel for each in parameters),
            )
            optimizer_count = sum(each.numel() for each in optimizer.fp32_partitioned_groups_flat)
            learning = sum(each.ds_numel for each in parameters if each.requires_grad)
        else:
            local_count = of = sum(each.numel() for each in parameters)
            optimizer_count = sum(each.numel() for each in optimizer.single_partition_of_fp32_groups)
            learning = sum(each.numel() for each in parameters if each.requires_grad)
        return {
            "engine": type(self.engine).__name__,
            "stage": int(self.engine.zero_optimization_stage()),
            "parameters": local_count,
            "of": of,
            "optimized": optimizer_count,
            "optimized_of": learning,
        }

    def right(self, evidence: dict[str, Any]) -> bool:
        share = {"parameters": evidence["optimized"], "of": evidence["optimized_of"]}
        whole_or_part = (
            is_a_part(evidence, self.world_size)
            if self.stage == 3
            else evidence["parameters"] == evidence["of"]
        )
        return bool(evidence["stage"] == self.stage and whole_or_part and is_a_part(share, self.world_size))
