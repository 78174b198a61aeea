"""Packing: rows of equal length from tokens, each with one document, or with several that are distinguished by numbers.

Packing is best-fit decreasing (Johnson 1973): longest first, each into the fullest row that has room.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from llmtrain.data.documents import Document, Rejects
from llmtrain.data.rows import Row, write_shard
from llmtrain.data.settings import Pack
from llmtrain.data.tokenization import LINES, TOKENS
from llmtrain.data.work_directory import Result

LINEAGE = "documents.jsonl.gz"


@dataclass(frozen=True)
class Piece:
    """A document that fits into a row, or a part of a longer one."""

    ids: NDArray[numpy.int32]
    learned: NDArray[numpy.uint8]
    document: int


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The pieces of each row, as indices of `lengths`, each of which is at most `capacity`."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # by room left: the rows that have it
    rooms = 0  # bit r is set if with_room[r] has a row
    for piece in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[piece]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the least that suffices
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        rest = room - length
        if rest:
            with_room.setdefault(rest, []).append(row)
            rooms |= 1 << rest
    return rows


def row_of(pieces: list[Piece], seq_len: int, pad: int) -> Row:
    """A row of consecutive pieces, numbered from 1, and padding."""
    ids = numpy.full(seq_len, pad, numpy.int32)
    learned = numpy.zeros(seq_len, numpy.uint8)
    document = numpy.zeros(seq_len, numpy.int32)
    place = 0
    for number, piece in enumerate(pieces, 1):
        end = place + len(piece.ids)
        ids[place:end], learned[place:end], document[place:end] = piece.ids, piece.learned, number
        place = end
    return Row(ids, learned, document)


def read_tokens(
    directories: list[Path],
) -> Iterator[tuple[dict[str, Any], NDArray[numpy.int32], NDArray[numpy.uint8]]]:
    """The lineage, token ids and learned flags of each document, from the files of `tokenize`."""
    for directory in directories:
        with numpy.load(directory / TOKENS) as arrays, (directory / LINES).open(encoding="utf-8") as lines:
            ids, learned, starts = arrays["ids"], arrays["learned"], arrays["starts"]
            for number, line in enumerate(lines):
                own = slice(starts[number], starts[number + 1])
                yield json.loads(line), ids[own], learned[own]


def pack(directory: Path, options: Pack, pad: int, number: int, directories: list[Path]) -> Result:
    """Write one file of rows from the tokens of some shards, and the lineage of its rows."""
    pieces: list[Piece] = []
    lines: list[dict[str, Any]] = []
    split = 0
    with Rejects(directory).of("pack", number) as reject:
        for line, ids, learned in read_tokens(directories):
            document = Document("", line["id"], {"source": line["source"]})
            if len(ids) > options.seq_len:
                if options.long == "drop":
                    reject(document, "long", f"{len(ids)} tokens, pack.seq_len is {options.seq_len}")
                    continue
                split += 1
            for start in range(0, len(ids), options.seq_len):
                own = slice(start, start + options.seq_len)
                counts = learned[own].copy()
                counts[0] = 0  # the first token of a row is never predicted
                if counts.any():
                    pieces.append(Piece(ids[own], counts, len(lines)))
                else:
                    # A row in which nothing is learned has a mean loss of NaN.
                    reject(document, "nothing_learned", f"no token to learn from token {start} on")
            lines.append({**line, "tokens": len(ids), "rows": set()})
    lengths = [len(piece.ids) for piece in pieces]
    bins = best_fit(lengths, options.seq_len) if options.packed else [[place] for place in range(len(pieces))]
    bins = [sorted(each) for each in bins]
    entry: Result = {"rows": 0}
    if bins:
        rows = [row_of([pieces[place] for place in each], options.seq_len, pad) for each in bins]
        entry = write_shard(directory, 0, rows)
    for row, each in enumerate(bins):
        for place in each:
            lines[pieces[place].document]["rows"].add(row)
    with (directory / LINEAGE).open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for line in lines:
            file.write(
                json.dumps({**line, "rows": sorted(line["rows"])}, ensure_ascii=False).encode() + b"\n"
            )
    return {
        **entry,
        "documents": len(lines),
        "tokens": sum(lengths),
        "learned": int(sum(int(piece.learned.sum()) for piece in pieces)),
        "split": split,
        "padding": len(bins) * options.seq_len - sum(lengths),
    }
