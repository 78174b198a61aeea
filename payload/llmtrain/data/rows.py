"""Packed data sets, which `llm-train data` writes and `llm-train run` reads. A directory contains

- `rows-NNNNN.safetensors`: `input_ids` int32, `learned` uint8 (1 if the loss counts), `document` int32 (1, 2, … in a
  row; 0 is padding), each of shape (rows, seq_len);
  For preferences `learned` says more, see `run.preferences`;
- `rows.json`: the digest of the tokenizer, and the rows and sha256 of each shard. Its own sha256 identifies the data set;
- `sources.sha256`: the sha256 of each input file, one per line.

Shards are memory-mapped: reading a row does not load the rest of its shard.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from llmcore.files import replacing, sha256_of, write_aside
from llmtrain.exits import ALTERED, Refusal

SOURCES = "sources.sha256"
NAMES = ("input_ids", "learned", "document")
# The files that define a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Row:
    """One sequence of `seq_len` tokens, of one document or several."""

    input_ids: NDArray[numpy.int32]
    learned: NDArray[numpy.uint8]
    document: NDArray[numpy.int32]

    @property
    def position_ids(self) -> NDArray[numpy.int64]:
        """Positions from 0 in each document, which separate documents in attention; shape (seq_len,)."""
        starts = numpy.flatnonzero(numpy.diff(self.document, prepend=-1))
        lengths = numpy.diff(starts, append=len(self.document))
        return numpy.arange(len(self.document)) - numpy.repeat(starts, lengths)


class Rows:
    """A data set on disk: `len()` is its number of rows, `[n]` its row n."""

    def __init__(self, directory: Path) -> None:
        """Read the index; raises Refusal if it is missing or invalid."""
        self.directory = directory
        try:
            self.index: dict[str, Any] = json.loads((directory / "rows.json").read_text())
            self.seq_len, self.tokenizer = int(self.index["seq_len"]), str(self.index["tokenizer"])
            self.objective = str(self.index.get("objective", "sft"))
            self.shards = [(str(s["file"]), int(s["rows"]), str(s["sha256"])) for s in self.index["shards"]]
        except OSError as error:
            raise Refusal(
                f"cannot read {directory}/rows.json: {error.strerror}; write it with `llm-train data run`"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"{directory}/rows.json is not an index of rows ({error!r}): pack the data again"
            ) from error
        self._starts = numpy.cumsum([0, *(rows for _, rows, _ in self.shards)])
        if not len(self):
            raise Refusal(f"{directory} has no rows, so it cannot be used for training; see its reject file")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(numpy.searchsorted(self._starts, number, side="right")) - 1
        inside = number - int(self._starts[shard])
        return Row(*(self._slices[shard][name][inside] for name in NAMES))

    @cached_property
    def _slices(self) -> list[dict[str, Any]]:
        """The memory-mapped tensors of each shard."""
        slices = []
        for file, _, _ in self.shards:
            opened: Any = safe_open(self.directory / file, framework="numpy")
            slices.append({name: opened.get_slice(name) for name in NAMES})
        return slices

    @property
    def digest(self) -> str:
        """The sha256 of the index, in hex. It identifies the data set, as the index has the sha256 of each shard."""
        return hashlib.sha256((self.directory / "rows.json").read_bytes()).hexdigest()

    def verify(self) -> None:
        """Check the hash of every shard against the index; raises Refusal."""
        for file, _, expected in self.shards:
            try:
                digest = sha256_of(self.directory / file)
            except OSError as error:
                raise Refusal(
                    f"cannot read {self.directory / file}: {error.strerror}; pack the data again", ALTERED
                ) from error
            if digest != expected:
                raise Refusal(
                    f"{self.directory / file} has sha256 {digest}, its index says {expected}: pack the data again",
                    ALTERED,
                )

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))


def tokenizer_digest(model: Path) -> str:
    """The sha256 of a model's tokenizer files and their names, in hex; raises Refusal if it has none."""
    digest = hashlib.sha256()
    files = [model / name for name in TOKENIZER_FILES if (model / name).is_file()]
    if not files:
        raise Refusal(f"{model} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def write_shard(directory: Path, number: int, rows: list[Row]) -> dict[str, Any]:
    """Write a shard atomically; return its entry of `shards` in the index."""
    path = directory / f"rows-{number:05d}.safetensors"
    with replacing(path) as aside:
        save_file({name: numpy.stack([getattr(row, name) for row in rows]) for name in NAMES}, aside)
    return {"file": path.name, "rows": len(rows), "sha256": sha256_of(path)}


def write_index(
    directory: Path, seq_len: int, tokenizer: str, shards: list[dict[str, Any]], **more: Any
) -> None:
    """Write `rows.json`, after everything else. `more` is further information, such as counts of documents and tokens."""
    index = {"seq_len": seq_len, "tokenizer": tokenizer, "shards": shards, **more}
    write_aside(directory / "rows.json", json.dumps(index, indent=1, sort_keys=True) + "\n")
