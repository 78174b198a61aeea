"""Batches: which rows a step takes, in tensors.

The order of rows depends on the seed alone, and the cursor of a job is a position in it: the number of rows that all ranks
together have taken. So a resumed job neither repeats nor skips a row, on any number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from llmtrain.data.rows import Row, Rows

IGNORED = -100  # the label of a position whose loss does not count: torch's cross_entropy knows it


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> NDArray[numpy.int64]:
    """The row numbers 0 to `rows` - 1 in the order of an epoch; shape (rows,)."""
    return numpy.random.default_rng([seed, epoch]).permutation(rows)


def row_number(place: int, rows: int, seed: int) -> int:
    """The number of the row at `place`, which counts from the start of the first epoch."""
    epoch, inside = divmod(place, rows)
    return int(permutation(seed, epoch, rows)[inside])


def labels(row: Row) -> NDArray[numpy.int64]:
    """The next token at each position, or IGNORED; shape (seq_len,).

    A token counts if it is marked as learned and follows a token of the same document.
    """
    same = row.document[1:] == row.document[:-1]
    counts = same & (row.learned[1:] > 0) & (row.document[1:] > 0)
    return numpy.append(numpy.where(counts, row.input_ids[1:], IGNORED), IGNORED)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one process; each tensor is int64 of shape (rows, seq_len)."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    tokens: int  # without padding and filler rows

    @property
    def learned(self) -> int:
        """The number of positions whose loss counts."""
        return int((self.labels != IGNORED).sum())

    def loss(self, model: Any) -> torch.Tensor:
        """The summed cross entropy of the positions that count, in fp32; a scalar.

        Logits are computed only at positions that count in some row. Without a mask and a cache, transformers separates
        documents by `position_ids`.
        """
        positions = (self.labels != IGNORED).any(0).nonzero().flatten()
        # Where nothing counts, the other ranks still wait for the collectives of a forward pass.
        if not len(positions):
            positions = torch.zeros(1, dtype=torch.long, device=self.labels.device)
        logits = model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            use_cache=False,
            logits_to_keep=positions,
        ).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            self.labels[:, positions].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )


Make = Callable[[list[tuple[int, bool]], Any], Batch]


def batch(rows: list[tuple[Row, bool]], device: Any) -> Batch:
    """A batch of rows; in rows given with False, no position counts."""

    def tensor(arrays: list[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(numpy.stack(arrays).astype(numpy.int64)).to(device, non_blocking=True)

    return Batch(
        tensor([row.input_ids for row, _ in rows]),
        tensor([row.position_ids for row, _ in rows]),
        tensor([labels(row) if counts else numpy.full_like(row.input_ids, IGNORED) for row, counts in rows]),
        sum(int((row.document > 0).sum()) for row, counts in rows if counts),
    )


def made_of(rows: Rows) -> Make:
    """Makes a batch of row numbers, each with whether its positions count, and a device."""
    return lambda selection, device: batch([(rows[number], counts) for number, counts in selection], device)


def step_batches(
    rows: Rows,
    seed: int,
    cursor: int,
    end: int,
    micro_batch: int,
    accumulate: int,
    rank: int,
    world_size: int,
    device: Any,
    make: Make | None = None,
) -> list[Batch]:
    """This rank's share of the rows from `cursor` on, in `accumulate` batches.

    Places at or past `end` are filled with rows that do not count, so that every step has the same shape. `make`: see `made_of`.
    """
    make = make or made_of(rows)
    batches = []
    for part in range(accumulate):
        first = cursor + (part * world_size + rank) * micro_batch
        places = [(place, place < end) for place in range(first, first + micro_batch)]
        batches.append(
            make(
                [
                    (row_number(place if counts else cursor, len(rows), seed), counts)
                    for place, counts in places
                ],
                device,
            )
        )
    return batches


def evaluation_batches(
    rows: Rows, micro_batch: int, rank: int, world_size: int, device: Any, make: Make | None = None
) -> Iterator[Batch]:
    """This rank's share of all rows, in order; every rank gets the same number of batches."""
    make = make or made_of(rows)
    for first in range(0, len(rows), micro_batch * world_size):
        own = range(first + rank * micro_batch, first + (rank + 1) * micro_batch)
        yield make([(min(each, len(rows) - 1), each < len(rows)) for each in own], device)
