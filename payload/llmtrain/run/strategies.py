"""DDP, FSDP2 and DeepSpeed's ZeRO behind the same few methods, and the evidence of which one runs.

What is asked for is not always what runs: a library that finds no GPU may fall back without a word. So `evidence` looks
at the object that does the work and at what each rank holds, and `proven` refuses what was not asked for.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from llmtrain.exits import FAILED, Refusal
from llmtrain.job import Optim
from llmtrain.run.batches import Batch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a parameter
TAG = "zero"


def adamw(parameters: list[Any], optim: Optim) -> torch.optim.AdamW:
    """torch's own in one kernel: DeepSpeed's would want a compiler on the host."""
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, fused=True
    )


class Replicated:
    """DDP: every rank has all of the model, gradients are averaged."""

    name = "ddp"

    def __init__(self, model: Any, optim: Optim, precision: str, device: torch.device) -> None:
        self.model, self.device, self.optim = model, device, optim
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.module = self.wrapped(DTYPES[precision])
        self.trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = adamw(list(self.trainable.values()), optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.precision = precision

    def wrapped(self, dtype: torch.dtype) -> Any:
        """The module to call."""
        return torch.nn.parallel.DistributedDataParallel(self.model.to(self.device))

    def alone(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay on this rank until the last batch of a step."""
        return nullcontext() if last else self.module.no_sync()

    def casting(self) -> AbstractContextManager[Any]:
        """Products in the job's precision."""
        context: AbstractContextManager[Any] = torch.autocast(
            self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
        )
        return context

    def loss(self, batch: Batch) -> torch.Tensor:
        """Its sum."""
        with self.casting():
            return batch.loss(self.module)

    def learn(
        self, batches: list[Batch], learned: int, lr: float, look: Callable[[], None]
    ) -> tuple[torch.Tensor, float]:
        """One step; the sum of this rank's losses and the gradients' global norm before clipping.

        `learned` is the number of positions that count in this step on all ranks. `look` is called while the gradients are there.
        """
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            with self.alone(number == len(batches) - 1):
                loss = self.loss(batch)
                # The mean over ranks is taken of gradients; this makes of it the mean over positions.
                self.scaler.scale(loss * (self.world_size / learned)).backward()
            total += loss.detach()
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
        """Of the loss in fp16."""
        return float(self.scaler.get_scale()) if self.scaler.is_enabled() else None

    @property
    def scale_of_gradients(self) -> float:
        """What they are still multiplied with when `learn` lets others look at them."""
        return 1.0

    def write(self, folder: Path) -> None:
        """What a resume needs of this rank: where all ranks have the same, one file a node."""
        if self.local_rank == 0:
            save_file(self.tensors(), folder / "trainable.safetensors")
        self.write_rng(folder)

    def read(self, folder: Path, world_size: int) -> str:
        """Take up what `write` of as many ranks wrote; what was lost by it, "" for nothing."""
        self.restore(load_file(folder / "trainable.safetensors"))
        return self.read_rng(folder, world_size)

    local_rank = property(lambda _: int(os.environ["LOCAL_RANK"]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's part of what learns, and of what AdamW keeps of it."""
        found = {}
        for name, parameter in self.trainable.items():
            found[f"{name}/weight"] = local(parameter)
            for moment in MOMENTS:
                if parameter in self.optimizer.state:
                    found[f"{name}/{moment}"] = local(self.optimizer.state[parameter][moment])
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            found["scaler"] = torch.tensor([state["scale"], float(state["_growth_tracker"])])
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
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

    def write_rng(self, folder: Path) -> None:
        """The state of what draws dropout on this rank."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        save_file(states, folder / f"rng-{self.rank:05d}.safetensors")

    def read_rng(self, folder: Path, world_size: int) -> str:
        """Put it back, if the world is the same."""
        if world_size != self.world_size:
            return "the random state of dropout"
        states = load_file(folder / f"rng-{self.rank:05d}.safetensors")
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)
        return ""

    def gathered(self, wanted: Callable[[Any], bool]) -> dict[str, torch.Tensor]:
        """The wanted parameters, whole, in the memory of rank 0; elsewhere {}. All ranks call it."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if wanted(parameter):
                tensor = self.complete(parameter)
                if self.rank == 0:
                    found[name] = tensor
        return found

    def complete(self, parameter: Any) -> torch.Tensor:
        """All of a parameter, a copy in memory."""
        return whole(parameter.detach()).cpu().clone()

    def evidence(self) -> dict[str, Any]:
        """What this rank runs and holds."""
        return {
            "engine": type(self.module).__name__,
            "parameters": sum(local(each).numel() for each in self.model.parameters()),
            "of": sum(each.numel() for each in self.model.parameters()),
        }

    def right(self, evidence: dict[str, Any]) -> bool:
        """Whether that is this strategy."""
        return bool(
            evidence["engine"] == "DistributedDataParallel" and evidence["parameters"] == evidence["of"]
        )


class Sharded(Replicated):
    """FSDP2: every rank has its part of each parameter, and of what AdamW keeps of it."""

    name = "fsdp"

    def wrapped(self, dtype: torch.dtype) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
        layers = self.model._no_split_modules or []
        for part in list(self.model.modules()):
            if type(part).__name__ in layers:
                fully_shard(part, **how)
        return fully_shard(self.model, **how)

    def alone(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def casting(self) -> AbstractContextManager[Any]:
        return nullcontext()  # by its own policy

    def write(self, folder: Path) -> None:
        save_file(self.tensors(), folder / f"shard-{self.rank:05d}.safetensors")
        self.write_rng(folder)

    def read(self, folder: Path, world_size: int) -> str:
        if world_size == self.world_size:
            self.restore(load_file(folder / f"shard-{self.rank:05d}.safetensors"))
            return self.read_rng(folder, world_size)
        files = [folder / f"shard-{rank:05d}.safetensors" for rank in range(world_size)]
        if not all(file.is_file() for file in files):
            raise Refusal(
                f"{folder} was saved by {world_size} ranks on several nodes, and {self.world_size} run now: copy its shard-* "
                "of all nodes into one job's checkpoint is not offered; resume with as many ranks",
                FAILED,
            )
        shards = [load_file(file) for file in files]
        self.restore({name: self.recut(name, [shard[name] for shard in shards]) for name in shards[0]})
        return self.read_rng(folder, world_size)

    def recut(self, name: str, shards: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of what others had parts of."""
        if name.endswith("/step") or name == "scaler":
            return shards[0]
        parts = torch.cat(shards).chunk(self.world_size)
        return parts[self.rank] if self.rank < len(parts) else parts[0][:0]

    def right(self, evidence: dict[str, Any]) -> bool:
        return evidence["engine"].startswith("FSDP") and is_a_part(evidence, self.world_size)


class Zero(Replicated):
    """DeepSpeed's ZeRO: 2 shards gradients and what AdamW keeps, 3 the parameters, too."""

    def __init__(
        self,
        model: Any,
        optim: Optim,
        precision: str,
        device: torch.device,
        config: dict[str, Any],
        alive: Any,
    ) -> None:
        """`config` is DeepSpeed's; `alive` what has to live as long as the model."""
        import deepspeed

        self.model, self.device, self.optim, self.precision = model, device, optim, precision
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.alive = alive
        self.stage = config["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        trainable = [each for each in model.parameters() if each.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
        self.module = self.engine

    def loss(self, batch: Batch) -> torch.Tensor:
        return batch.loss(self.engine)

    def learn(
        self, batches: list[Batch], learned: int, lr: float, look: Callable[[], None]
    ) -> tuple[torch.Tensor, float]:
        total = torch.zeros((), device=self.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for number, batch in enumerate(batches):
            loss = self.loss(batch)
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
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        self.write_rng(folder)

    def read(self, folder: Path, world_size: int) -> str:
        """DeepSpeed unpickles here; Checkpoints has verified the folder."""
        if world_size == self.world_size:
            done, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
            if done is None:
                raise Refusal(f"DeepSpeed does not take its own checkpoint {folder}: see its log", FAILED)
            return self.read_rng(folder, world_size)
        self.take_weights(folder, world_size)
        return "what AdamW kept (it starts anew) and the random state of dropout"

    def take_weights(self, folder: Path, world_size: int) -> None:
        """The weights alone, out of the parts of another number of ranks."""
        from deepspeed import zero
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        except (OSError, ValueError) as error:
            raise Refusal(
                f"{folder} was saved by {world_size} ranks, {self.world_size} run now, and not all of its parts are on "
                f"this node ({type(error).__name__}): resume with as many ranks",
                FAILED,
            ) from error
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                    parameter.data.copy_(found[name])
        if self.stage == 3:
            self.engine.optimizer._restore_from_bit16_weights()
        else:
            self.engine.optimizer.refresh_fp32_params()

    def complete(self, parameter: Any) -> torch.Tensor:
        from deepspeed import zero

        with zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().cpu().clone() if self.rank == 0 else torch.empty(0)

    def evidence(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        optimizer = self.engine.optimizer
        if self.stage == 3:
            held, of = (
                sum(each.ds_tensor.numel() for each in parameters),
                sum(each.ds_numel for each in parameters),
            )
            kept = sum(each.numel() for each in optimizer.fp32_partitioned_groups_flat)
            learning = sum(each.ds_numel for each in parameters if each.requires_grad)
        else:
            held = of = sum(each.numel() for each in parameters)
            kept = sum(each.numel() for each in optimizer.single_partition_of_fp32_groups)
            learning = sum(each.numel() for each in parameters if each.requires_grad)
        return {
            "engine": type(self.engine).__name__,
            "stage": int(self.engine.zero_optimization_stage()),
            "parameters": held,
            "of": of,
            "optimized": kept,
            "optimized_of": learning,
        }

    def right(self, evidence: dict[str, Any]) -> bool:
        kept = {"parameters": evidence["optimized"], "of": evidence["optimized_of"]}
        whole_or_part = (
            is_a_part(evidence, self.world_size)
            if self.stage == 3
            else evidence["parameters"] == evidence["of"]
        )
        return bool(evidence["stage"] == self.stage and whole_or_part and is_a_part(kept, self.world_size))


def is_a_part(evidence: dict[str, Any], world_size: int) -> bool:
    """Whether a rank holds about 1/world_size; parameters that cannot be cut evenly leave a little more or less."""
    share: float = evidence["parameters"] * world_size / evidence["of"]
    return 0.8 <= share <= 1.25


def local(tensor: Any) -> Any:
    """This rank's part of a tensor that is spread, or all of one that is not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    """All of it; every rank has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Any, part: torch.Tensor) -> Any:
    """A tensor spread as `parameter` is, of which this rank has `part`."""
    if not isinstance(parameter, DTensor):
        return part
    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, *where, shape=parameter.shape, stride=parameter.stride())


def proven(strategy: Replicated) -> dict[str, Any]:
    """The evidence of all ranks; raises Refusal if some rank does not run what was asked for."""
    told: list[Any] = [None] * strategy.world_size
    distributed.all_gather_object(told, strategy.evidence())
    for rank, evidence in enumerate(told):
        if not strategy.right(evidence):
            raise Refusal(
                f"scale.strategy is {strategy.name}, and rank {rank} runs {evidence}: that is not it; nothing was trained",
                FAILED,
            )
    return {"strategy": strategy.name, "world_size": strategy.world_size, "ranks": told}
