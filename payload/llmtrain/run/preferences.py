"""Preferences: batches whose loss compares answers, by DPO or KTO, with the model as it was before training.

A row holds several answers, each with its prompt, as separate documents. `learned` is 1 at tokens of a good answer, 2 of a bad
one, 3 of an answer to another prompt, by which KTO estimates how far the model has moved. DPO: documents 1 and 2, 3 and 4, … are
a good and a bad answer to one prompt. Losses are TRL's (`DPOTrainer` and `KTOTrainer`, loss types `sigmoid` and `kto`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from llmtrain.data.rows import Row, Rows
from llmtrain.job import Preference
from llmtrain.run.batches import IGNORED, Batch, batch

GOOD, BAD, OTHER = 1, 2, 3  # answers, by `Row.learned`


def kinds(row: Row) -> NDArray[numpy.int64]:
    """Whether each document of a row is GOOD, BAD or OTHER; shape (documents,)."""
    classes = numpy.zeros(int(row.document.max(initial=0)), numpy.int64)
    marked = row.learned > 0
    classes[row.document[marked] - 1] = row.learned[marked]
    return classes


def summed(values: torch.Tensor, document: torch.Tensor, documents: int) -> torch.Tensor:
    """Sums of `values` by document; all of shape (rows, positions), the sums (rows, documents)."""
    sums = torch.zeros(len(values), documents + 1, dtype=values.dtype, device=values.device)
    return sums.scatter_add(1, document, values)[:, 1:]  # document 0 is padding


@dataclass(frozen=True)
class Compared(Batch, ABC):
    """Rows of answers. `document`: int64 (rows, seq_len), 0 where no loss counts; `kind` and `reference`: (rows, documents), the
    kind of each answer (0: none), and its log-probability before training.
    """

    document: torch.Tensor
    kind: torch.Tensor
    reference: torch.Tensor
    options: Preference

    def log_probabilities(self, model: Any) -> torch.Tensor:
        """The summed log-probability of each answer, in fp32; shape (rows, documents)."""
        positions = (self.labels != IGNORED).any(0).nonzero().flatten()
        if not len(positions):  # the other ranks wait for the collectives of a forward pass
            positions = torch.zeros(1, dtype=torch.long, device=self.labels.device)
        logits = model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            use_cache=False,
            logits_to_keep=positions,
        ).logits.float()
        labels = self.labels[:, positions]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        return summed(-losses, self.document[:, positions], self.kind.shape[1])

    def loss(self, model: Any) -> torch.Tensor:
        """The summed loss of all pairs (DPO) or answers (KTO)."""
        return self.compare(self.log_probabilities(model) - self.reference)

    @abstractmethod
    def compare(self, ratios: torch.Tensor) -> torch.Tensor:
        """The summed loss, by the log-ratios to the model before training; shape (rows, documents)."""


@dataclass(frozen=True)
class Pairs(Compared):
    """DPO (Rafailov et al. 2023, equation 7)."""

    @property
    def learned(self) -> int:
        """The number of pairs."""
        return int((self.kind == GOOD).sum())

    def compare(self, ratios: torch.Tensor) -> torch.Tensor:
        margins = ratios[:, 0::2] - ratios[:, 1::2]
        losses = -torch.nn.functional.logsigmoid(self.options.beta * margins)
        return (losses * (self.kind[:, 0::2] == GOOD)).sum()


@dataclass(frozen=True)
class Thumbs(Compared):
    """KTO (Ethayarajh et al. 2024, equation 8). `moved`: the estimate of the divergence from the model before
    training, for all answers of a step, which `set_drift` has to put there first; a scalar.
    """

    moved: torch.Tensor

    @property
    def learned(self) -> int:
        """The number of answers that are good or bad."""
        return int(((self.kind == GOOD) | (self.kind == BAD)).sum())

    def compare(self, ratios: torch.Tensor) -> torch.Tensor:
        beta, good, bad = self.options.beta, self.kind == GOOD, self.kind == BAD
        gained = torch.sigmoid(beta * torch.where(good, ratios - self.moved, self.moved - ratios))
        weights = self.options.desirable_weight * good + self.options.undesirable_weight * bad
        return ((1 - gained) * weights).sum()

    def drift(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Sum and number of the log-ratios of answers to other prompts, as float64."""
        other = self.kind == OTHER
        ratios = (log_probabilities - self.reference)[other]
        return torch.stack([ratios.double().sum(), other.sum().double()]).cpu()


class Preferences:
    """The data that a preference job needs besides its rows: the log-probability of each answer before training."""

    def __init__(self, rows: Rows, options: Preference) -> None:
        self.rows, self.options = rows, options
        self.documents = int(rows.index["documents_a_row"])
        self.reference: NDArray[numpy.float32] = numpy.zeros((len(rows), self.documents), numpy.float32)

    def batch(self, selection: list[tuple[int, bool]], device: Any) -> Compared:
        """A batch of rows by number; in those with False, no answer counts."""
        rows = [(self.rows[number], counts) for number, counts in selection]
        plain = batch(rows, device)

        def tensor(arrays: list[NDArray[Any]]) -> torch.Tensor:
            return torch.from_numpy(numpy.stack(arrays)).to(device, non_blocking=True)

        kind = numpy.zeros((len(rows), self.documents), numpy.int64)
        for place, (row, counts) in enumerate(rows):
            if counts:
                classes = kinds(row)
                kind[place, : len(classes)] = classes
        fields: dict[str, Any] = {
            **vars(plain),
            "document": tensor([row.document.astype(numpy.int64) for row, _ in rows])
            * (plain.labels != IGNORED),
            "kind": torch.from_numpy(kind).to(device),
            "reference": tensor([self.reference[number] for number, _ in selection]),
            "options": self.options,
        }
        if self.rows.objective == "kto":
            return Thumbs(**fields, moved=torch.zeros((), device=device))
        return Pairs(**fields)

    def measure_reference(
        self,
        log_probabilities: Callable[[Compared], torch.Tensor],
        added_up: Callable[[torch.Tensor], torch.Tensor],
        micro_batch: int,
        rank: int,
        world_size: int,
        device: Any,
    ) -> None:
        """Compute the log-probability of each answer with the untrained model; every rank computes its share."""
        for first in range(0, len(self.rows), micro_batch * world_size):
            own = range(first + rank * micro_batch, first + (rank + 1) * micro_batch)
            answers = self.batch(
                [(min(each, len(self.rows) - 1), each < len(self.rows)) for each in own], device
            )
            values = log_probabilities(answers).cpu().numpy()
            for place, number in enumerate(own):
                if number < len(self.rows):
                    self.reference[number] = values[place]
        self.reference = added_up(torch.from_numpy(self.reference)).numpy()


def measured_drift(
    batches: Iterable[Batch],
    log_probabilities: Callable[[Compared], torch.Tensor],
    added_up: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """KTO's reference point: the mean log-ratio of answers to other prompts, at least 0, over all `batches` of all ranks, which
    have equally many. TRL's is of a micro-batch, which would make the loss depend on how many processes there are.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for each in batches:
        if isinstance(each, Thumbs):
            total += each.drift(log_probabilities(each))
    ratios, number = map(float, added_up(total).tolist())
    return max(0.0, ratios / max(1.0, number))


def set_drift(batches: Iterable[Batch], moved: float) -> None:
    """Set in batches for KTO how far the model has moved."""
    for each in batches:
        if isinstance(each, Thumbs):
            each.moved.fill_(moved)
