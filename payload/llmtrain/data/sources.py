"""Which files are read, cut into shards of work that depend on the files alone: not on how many workers there are.

A big plain file of lines is cut by byte ranges, each of which begins with a line. Small files share a shard.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.settings import Input
from llmtrain.exits import Refusal

COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
    ".html": "html", ".htm": "html", ".xhtml": "html",
    ".parquet": "parquet",
    ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
BLOCK = 1 << 20
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Piece:
    """A file, or the bytes from `start` to `end` of it, and which input it belongs to."""

    path: Path
    input: int
    format: str
    start: int
    end: int

    def stamp(self) -> Stamp:
        """Changes whenever the file does: no tool can set a file's time of change back."""
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def sha256(self) -> str:
        """Of its bytes."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            while left and (block := file.read(min(left, BLOCK))):
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()


def shards_of(inputs: Sequence[Input], shard_mb: int) -> list[list[Piece]]:
    """All inputs' files, in the order of the inputs and paths; raises Refusal for what cannot be read."""
    limit = shard_mb << 20
    shards: list[list[Piece]] = []
    for number, given in enumerate(inputs):
        group: list[Piece] = []
        for path in files_of(given):
            form, compressed = format_of(path, given)
            lines = form == "jsonl" or (form == "text" and given.documents == "line")
            # UTF-16's newline is two bytes, of which one may be half of another letter.
            cut = lines and not compressed and given.encoding != "utf-16"
            ranges = list(line_ranges(path, limit)) if cut else [(0, path.stat().st_size)]
            for start, end in ranges:
                group.append(Piece(path, number, form, start, end))
                full = sum(piece.end - piece.start for piece in group) >= limit
                # A group also ends where a path's hash says so: a new file then moves only its own group.
                if full or zlib.crc32(str(path).encode()) % 64 == 0:
                    shards.append(group)
                    group = []
        if group:
            shards.append(group)
    if not shards:
        raise Refusal(
            f"all files of {', '.join(given.path for given in inputs)} are empty: give some with text"
        )
    return shards


def files_of(given: Input) -> list[Path]:
    """The files that an input means, sorted."""
    path = Path(given.path)
    if path.is_dir():
        found = [each for each in path.rglob("*") if each.is_file()]
    elif path.is_file():
        found = [path]
    else:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(anchor))
        found = [each for each in anchor.glob(pattern) if each.is_file()]
    if not found:
        raise Refusal(f"inputs has path {given.path!r}: no file is there; correct it or take it out")
    return sorted(found)


def format_of(path: Path, given: Input) -> tuple[str, bool]:
    """What a file is, and whether it is compressed."""
    endings = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(endings) and endings[-1] in COMPRESSED
    if given.format != "auto":
        return given.format, compressed
    named = endings[-2:-1] if compressed else endings[-1:]
    form = FORMATS.get(named[0]) if named else None
    if form is None:
        raise Refusal(
            f"{path} has an ending that says nothing of its format: set `format` for this input, "
            "or narrow its path to the files that are meant"
        )
    return form, compressed


def line_ranges(path: Path, limit: int) -> Iterator[tuple[int, int]]:
    """The file from line to line, in ranges of about `limit` bytes."""
    size = path.stat().st_size
    start = 0
    with path.open("rb") as file:
        while start < size:
            end = min(start + limit, size)
            file.seek(end)
            # A line may be larger than memory: it is looked for in blocks.
            while end < size and (block := file.read(BLOCK)):
                newline = block.find(b"\n")
                end += len(block) if newline < 0 else newline + 1
                if newline >= 0:
                    break
            yield start, end
            start = end
