"""Weights and AdamW's state in fp32 under DeepSpeed's ZeRO, by parameter, whatever DeepSpeed joins and pads them to."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.run.collectives import together
from llmtrain.run.strategies.shards import Shards, write_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)  # what DeepSpeed's loss scaler changes


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter that this rank steps, in elements."""

    name: str
    start: int  # in the parameter
    length: int
    flat: torch.Tensor  # DeepSpeed's, of many parameters, in fp32
    offset: int  # in `flat`

    def cut(self, flat: torch.Tensor) -> torch.Tensor:
        """The range in a tensor that has the layout of `self.flat`; a view."""
        return flat.data.narrow(0, self.offset, self.length)


def fragments(model: Any, optimizer: Any, stage: int, rank: int) -> Iterator[Fragment]:
    """This rank's fragments, by DeepSpeed's own tables."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if stage == 3:
        for parameters in optimizer.fp16_groups:
            for parameter in parameters:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = min(rank * size, parameter.ds_numel)
                length = min(size, parameter.ds_numel - start)  # the last parts are padded
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(names[id(parameter)], start, length, flat, offset)
        return
    for parameters, flat in zip(
        optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        for parameter in parameters:
            if mapping := parameter._hp_mapping:  # else other ranks step it
                place, where = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(names[id(parameter)], place.start, place.numel, flat, where.start)


class ZeroState:
    """The fragments of an engine's optimizer, to write and to read."""

    def __init__(self, model: Any, optimizer: Any, stage: int, rank: int) -> None:
        self.optimizer, self.stage, self.rank = optimizer, stage, rank
        self.fragments = list(fragments(model, optimizer, stage, rank))

    @property
    def states(self) -> Any:
        """AdamW's state by flat tensor; empty before the first step that is not skipped."""
        return self.optimizer.optimizer.state

    def write(self, folder: Path) -> None:
        """Write this rank's file of a checkpoint."""
        tensors, starts = {}, {}
        for each in self.fragments:
            states = {"weight": each.flat, **{key: self.states[each.flat].get(key) for key in MOMENTS}}
            for key, flat in states.items():
                if flat is not None:
                    tensors[f"{each.name}/{key}"] = each.cut(flat)
                    starts[f"{each.name}/{key}"] = each.start
        steps = [state["step"] for state in self.states.values() if "step" in state]
        if steps:
            tensors["step"] = steps[0]
        scaler = self.optimizer.loss_scaler
        if scaler.dynamic:
            tensors["scaler"] = torch.tensor([float(getattr(scaler, name)) for name in SCALER]).double()
        write_shard(folder, self.rank, tensors, starts)

    def read(self, folder: Path, world_size: int) -> None:
        """Restore a checkpoint that `world_size` ranks wrote; all ranks call it. Raises Refusal on all if one lacks a file."""
        shards = Shards(folder, world_size)
        stepped = "step" in shards
        keys = ("weight", *MOMENTS) if stepped else ("weight",)
        saved = together(
            lambda: [
                [shards.rows(f"{each.name}/{key}", each.start, each.length) for key in keys]
                for each in self.fragments
            ]
        )
        if stepped:
            for flat in {id(each.flat): each.flat for each in self.fragments}.values():
                step = shards.whole("step").to(flat.device)
                self.states[flat] = {"step": step, **{key: torch.zeros_like(flat.data) for key in MOMENTS}}
        for each, (weight, *moments) in zip(self.fragments, saved, strict=True):
            each.cut(each.flat).copy_(weight)
            for key, moment in zip(MOMENTS, moments, strict=False):
                each.cut(self.states[each.flat][key]).copy_(moment)
        if "scaler" in shards:
            for name, value in zip(SCALER, shards.whole("scaler").tolist(), strict=True):
                setattr(self.optimizer.loss_scaler, name, value if name == "cur_scale" else int(value))
        self.renew_weights()

    def renew_weights(self) -> None:
        """Make the model's weights those in fp32; all ranks call it."""
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.optimizer.checkpoint_event_epilogue()
        else:
            self.optimizer.update_lp_params()
