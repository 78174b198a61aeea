"""torch's AdamW with fp16 loss scaling: what DDP and FSDP2 have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from llmtrain.job import Optim
from llmtrain.run.batches import Batch

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter


class AdamW:
    """The trainable parameters of a model, whole or sharded, and their optimizer."""

    def __init__(self, model: Any, optim: Optim, precision: str, device: torch.device) -> None:
        self.optim, self.device = optim, device
        self.trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        # In one kernel. DeepSpeed's own would want a compiler on the host.
        self.optimizer = torch.optim.AdamW(
            list(self.trainable.values()),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def learn(
        self,
        batches: list[Batch],
        loss: Callable[[Batch], torch.Tensor],
        synchronized: Callable[[bool], AbstractContextManager[Any]],
        weight: float,
        lr: float,
        look: Callable[[], None],
    ) -> tuple[torch.Tensor, float]:
        """`Strategy.learn`, with the loss weighted by `weight`. `synchronized(last)` is entered around each batch, so that
        gradients are exchanged only after the last one."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            with synchronized(number == len(batches) - 1):
                summed = loss(batch)
                self.scaler.scale(summed * weight).backward()
            total += summed.detach()
        self.scaler.unscale_(self.optimizer)
        look()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total, float(whole(norm))

    @property
    def scale(self) -> float | None:
        """The loss scale in fp16, else None."""
        return float(self.scaler.get_scale()) if self.scaler.is_enabled() else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's part of the weights and moments, `NAME/weight` and `NAME/exp_avg`, on the CPU."""
        tensors = {}
        for name, parameter in self.trainable.items():
            tensors[f"{name}/weight"] = local(parameter)
            for moment in MOMENTS:
                if parameter in self.optimizer.state:
                    tensors[f"{name}/{moment}"] = local(self.optimizer.state[parameter][moment])
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            tensors["scaler"] = torch.tensor([state["scale"], float(state["_growth_tracker"])])
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def rows(self) -> dict[str, int]:
        """The length of the first dimension, before it is cut, of each of `tensors` that may be cut."""
        cut = ("weight", *MOMENTS[:2])
        return {
            f"{name}/{each}": parameter.shape[0] for name, parameter in self.trainable.items() for each in cut
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `tensors` returned, sharded as the parameters are now."""
        for name, parameter in self.trainable.items():
            with torch.no_grad():
                local(parameter).copy_(tensors[f"{name}/weight"])
            if f"{name}/step" in tensors:
                self.optimizer.state[parameter] = {
                    moment: tensors[f"{name}/{moment}"].to(self.device)
                    if moment == "step"
                    else like(parameter, tensors[f"{name}/{moment}"].to(self.device))
                    for moment in MOMENTS
                }
        if "scaler" in tensors:
            scale, tracker = tensors["scaler"].tolist()
            self.scaler.load_state_dict(
                {**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)}
            )


def local(tensor: Any) -> Any:
    """This rank's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    """A sharded tensor unsharded, which all ranks have to call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(parameter: Any) -> torch.Tensor:
    """A copy of the whole parameter on the CPU; all ranks call it."""
    copy: torch.Tensor = whole(parameter.detach()).cpu().clone()
    return copy


def like(parameter: Any, shard: torch.Tensor) -> Any:
    """A tensor sharded as `parameter` is, with `shard` on this rank."""
    if not isinstance(parameter, DTensor):
        return shard
    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(shard, *where, shape=parameter.shape, stride=parameter.stride())


def evidence_of(module: Any, model: Any) -> dict[str, Any]:
    """Evidence: the class that runs, and how many of the model's parameters this rank holds."""
    return {
        "engine": type(module).__name__,
        "parameters": sum(local(each).numel() for each in model.parameters()),
        "of": sum(each.numel() for each in model.parameters()),
    }
