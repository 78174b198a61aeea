"""Packed rows: what `llm-train data` writes and `llm-train run` reads. A directory of

- `rows-NNNNN.safetensors`: `input_ids` int32, `learned` uint8 (1 where the loss counts), `document` int32 (1, 2, … in a
  row; 0 is padding), each of shape (rows, seq_len);
- `rows.json`: the tokenizer they are for, and each shard's rows and sha256. Its own sha256 names the data set;
- `sources.sha256`: the files that they were made of, by their sha256, a line each.

A row is read by itself, without the rest of its shard in memory.
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

from llmcore.files import flush, sha256_of, write_aside
from llmtrain.exits import ALTERED, Refusal

SOURCES = "sources.sha256"
NAMES = ("input_ids", "learned", "document")
# What makes two tokenizers the same, as far as a model can tell.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Row:
    """One sequence of `seq_len` tokens, of one document or several."""

    input_ids: NDArray[numpy.int32]
    learned: NDArray[numpy.uint8]
    document: NDArray[numpy.int32]

    @property
    def position_ids(self) -> NDArray[numpy.int64]:
        """Each document's tokens counted from 0, so that attention keeps documents apart; shape (seq_len,)."""
        starts = numpy.flatnonzero(numpy.diff(self.document, prepend=-1))
        lengths = numpy.diff(starts, append=len(self.document))
        return numpy.arange(len(self.document)) - numpy.repeat(starts, lengths)


class Rows:
    """A data set on disk. `len()` is its number of rows, `[n]` is a Row."""

    def __init__(self, directory: Path) -> None:
        """Reads the index; raises Refusal where there is none, or it is not one."""
        self.directory = directory
        try:
            self.index: dict[str, Any] = json.loads((directory / "rows.json").read_text())
            self.seq_len, self.tokenizer = int(self.index["seq_len"]), str(self.index["tokenizer"])
            self.shards = [(str(s["file"]), int(s["rows"]), str(s["sha256"])) for s in self.index["shards"]]
        except OSError as error:
            raise Refusal(
                f"cannot read {directory}/rows.json: {error.strerror}; write it with `llm-train data run`"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"{directory}/rows.json is no index of rows ({error!r}): pack the data again"
            ) from error
        self._starts = numpy.cumsum([0, *(rows for _, rows, _ in self.shards)])
        if not len(self):
            raise Refusal(f"{directory} has no row: nothing can be learned from it; see its reject file")

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
        """The shards' tensors, mapped into memory, not read."""
        found = []
        for file, _, _ in self.shards:
            opened: Any = safe_open(self.directory / file, framework="numpy")
            found.append({name: opened.get_slice(name) for name in NAMES})
        return found

    @property
    def digest(self) -> str:
        """The data set's name by its content: the sha256 of its index, which has those of its shards."""
        return hashlib.sha256((self.directory / "rows.json").read_bytes()).hexdigest()

    def verify(self) -> None:
        """Every shard has the hash that the index says; raises Refusal."""
        for file, _, wanted in self.shards:
            try:
                seen = sha256_of(self.directory / file)
            except OSError as error:
                raise Refusal(
                    f"cannot read {self.directory / file}: {error.strerror}; pack the data again", ALTERED
                ) from error
            if seen != wanted:
                raise Refusal(
                    f"{self.directory / file} has sha256 {seen}, its index says {wanted}: pack the data again",
                    ALTERED,
                )

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))


def tokenizer_digest(model: Path) -> str:
    """The sha256 of a model's tokenizer files, by name; raises Refusal where it has none."""
    digest = hashlib.sha256()
    found = [model / name for name in TOKENIZER_FILES if (model / name).is_file()]
    if not found:
        raise Refusal(f"{model} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    for path in found:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def write_shard(directory: Path, number: int, rows: list[Row]) -> dict[str, Any]:
    """Write a shard aside and rename it; the entry of `shards` in the index."""
    path = directory / f"rows-{number:05d}.safetensors"
    aside = path.with_suffix(".partial")
    save_file({name: numpy.stack([getattr(row, name) for row in rows]) for name in NAMES}, aside)
    flush(aside)
    digest = sha256_of(aside)
    aside.replace(path)
    return {"file": path.name, "rows": len(rows), "sha256": digest}


def write_index(
    directory: Path, seq_len: int, tokenizer: str, shards: list[dict[str, Any]], **more: Any
) -> None:
    """Write `rows.json`, last of all; `more` is what else is worth knowing: documents, tokens, padding, lineage."""
    index = {"seq_len": seq_len, "tokenizer": tokenizer, "shards": shards, **more}
    write_aside(directory / "rows.json", json.dumps(index, indent=1, sort_keys=True) + "\n")
