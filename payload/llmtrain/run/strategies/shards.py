"""Checkpoint files with each rank's part of the weights and of AdamW's state, readable by any number of ranks.

A file contains ranges of tensors along their first dimension; its metadata says where each begins. A rank that resumes reads its
part from the files that contain it, so the number of ranks may change, and the whole state need not fit in memory. The files
contain no pickles, unlike those of torch.distributed.checkpoint and DeepSpeed's universal checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmtrain.exits import FAILED, Refusal


def write_shard(folder: Path, rank: int, tensors: dict[str, torch.Tensor], starts: dict[str, int]) -> None:
    """Write this rank's file. A tensor without a start is whole, and the same on all ranks."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / f"shard-{rank:05d}.safetensors", metadata={"starts": json.dumps(starts)})


class Shards:
    """The files of a checkpoint that are on this node."""

    def __init__(self, folder: Path, world_size: int) -> None:
        """`world_size` ranks wrote the checkpoint."""
        self.folder, self.world_size = folder, world_size
        self.files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("shard-*.safetensors"))
        ]
        self.parts: dict[str, list[tuple[int | None, Any]]] = {}
        for file in self.files:
            starts = json.loads(file.metadata()["starts"])
            for name in file.keys():  # noqa: SIM118 - not a dict
                self.parts.setdefault(name, []).append((starts.get(name), file))

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def whole(self, name: str) -> torch.Tensor:
        """A tensor that is the same on all ranks."""
        tensor: torch.Tensor = self.parts[name][0][1].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, length: int) -> torch.Tensor:
        """`length` rows of a tensor from `start` on; raises Refusal unless the files have them all."""
        end, at, pieces = start + length, start, []
        parts = [(begin or 0, file.get_slice(name)) for begin, file in self.parts.get(name, [])]
        for begin, part in sorted(parts, key=lambda each: each[0]):
            stop = begin + part.get_shape()[0]
            if begin <= at < min(stop, end):
                pieces.append(part[at - begin : min(stop, end) - begin])
                at = min(stop, end)
        if at < end or not parts:
            raise Refusal(
                f"{self.folder}, saved by {self.world_size} ranks, has no rows {at} to {end} of {name} in the {len(self.files)} "
                "files on this node: start the nodes in the order in which they saved, with as many ranks as saved it",
                FAILED,
            )
        return torch.cat(pieces) if pieces else parts[0][1][:0]


def part(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of a rank's part of so many rows, as torch.chunk cuts them."""
    size = -(-rows // world_size)
    start = min(rank * size, rows)
    return start, min(size, rows - start)
