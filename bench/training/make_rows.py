"""Makes, in the directory named first, what bench/sft.py and bench/train_gpu.py train: rows of one whole document, and short
documents packed and one a row; and a Llama of 5 M parameters, unless --model names another.

Tokens are random: nothing of what is measured depends on them.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy
import torch
from llmtrain.data.rows import Row, tokenizer_digest, write_index, write_shard
from numpy.typing import NDArray
from tiny import make_model
from transformers import AutoConfig

from llmcore.manifest import write_manifest

SIZE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
Tokens = NDArray[Any]


def rows_of(documents: list[Tokens], seq_len: int, pack: bool) -> list[Row]:
    """Each document into the first of the last rows that has room, or each into a row of its own."""
    rows: list[list[Tokens]] = []
    for document in documents:
        room = (row for row in rows[-8:] if pack and sum(map(len, row)) + len(document) <= seq_len)
        row = next(room, None)
        if row is None:
            rows.append([document])
        else:
            row.append(document)
    made = []
    for row in rows:
        ids, numbers = numpy.zeros(seq_len, numpy.int32), numpy.zeros(seq_len, numpy.int32)
        flat = numpy.concatenate(row)
        ids[: len(flat)] = flat
        numbers[: len(flat)] = numpy.repeat(numpy.arange(1, len(row) + 1), [len(each) for each in row])
        made.append(Row(ids, (numbers > 0).astype(numpy.uint8), numbers))
    return made


def write(directory: Path, tokenizer: str, rows: list[Row]) -> None:
    """A data set of one shard."""
    directory.mkdir()
    write_index(directory, len(rows[0].input_ids), tokenizer, [write_shard(directory, 0, rows)])


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    where: Path = options.where
    model = options.model or where / "model"
    if options.model is None:
        make_model(model, torch.float32, **SIZE)
        write_manifest(model, where / "model.sha256")
    config = AutoConfig.from_pretrained(model)
    end = config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]
    generator = numpy.random.default_rng(1)

    def document(length: int) -> Tokens:
        ids = generator.integers(3, config.vocab_size, length).astype(numpy.int32)
        ids[-1] = end
        return ids

    tokenizer, seq_len = tokenizer_digest(model), options.seq_len
    write(
        where / "whole",
        tokenizer,
        rows_of([document(seq_len) for _ in range(options.rows)], seq_len, pack=False),
    )
    lengths = numpy.clip(
        generator.lognormal(3.6, 0.6, 4 * options.rows).astype(int), 8, seq_len
    )  # 44 in the mean
    short = [document(int(length)) for length in lengths]
    write(where / "packed", tokenizer, rows_of(short, seq_len, pack=True))
    write(where / "unpacked", tokenizer, rows_of(short[: options.rows], seq_len, pack=False))
    key = where / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))


if __name__ == "__main__":
    main()
