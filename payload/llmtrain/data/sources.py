"""The input files, divided into shards that depend on the files alone, not on the number of workers.

Large uncompressed files of lines are divided into byte ranges that start at a line. Small files share a shard.
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
    """The bytes of a file from `start` to `end`, and the number of its input."""

    path: Path
    input: int
    format: str
    start: int
    end: int

    def stamp(self) -> Stamp:
        """Changes whenever the file does, as ctime cannot be set back."""
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def sha256(self) -> str:
        """The sha256 of its bytes, in hex."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(self.start)
            remaining = self.end - self.start
            while remaining and (block := file.read(min(remaining, BLOCK))):
                digest.update(block)
                remaining -= len(block)
        return digest.hexdigest()


def shards_of(inputs: Sequence[Input], shard_mb: int) -> list[list[Piece]]:
    """The pieces of all inputs by shard, in the order of inputs and paths; raises Refusal for unreadable inputs."""
    limit = shard_mb << 20
    shards: list[list[Piece]] = []
    for number, source in enumerate(inputs):
        group: list[Piece] = []
        for path in files_of(source):
            form, compressed = format_of(path, source)
            lines = form == "jsonl" or (form == "text" and source.documents == "line")
            # A newline in UTF-16 has two bytes, each of which also occurs in other characters.
            cut = lines and not compressed and source.encoding != "utf-16"
            ranges = list(line_ranges(path, limit)) if cut else [(0, path.stat().st_size)]
            for start, end in ranges:
                group.append(Piece(path, number, form, start, end))
                full = sum(piece.end - piece.start for piece in group) >= limit
                # A group may also end by a path's hash, so that a new file changes only its own group.
                if full or zlib.crc32(str(path).encode()) % 64 == 0:
                    shards.append(group)
                    group = []
        if group:
            shards.append(group)
    if not shards:
        raise Refusal(
            f"all files of {', '.join(source.path for source in inputs)} are empty: add files with text"
        )
    return shards


def files_of(source: Input) -> list[Path]:
    """The files of an input, sorted; raises Refusal if there are none."""
    path = Path(source.path)
    if path.is_dir():
        files = [each for each in path.rglob("*") if each.is_file()]
    elif path.is_file():
        files = [path]
    else:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(anchor))
        files = [each for each in anchor.glob(pattern) if each.is_file()]
    if not files:
        raise Refusal(f"inputs has path {source.path!r}, which matches no file: correct or remove it")
    return sorted(files)


def format_of(path: Path, source: Input) -> tuple[str, bool]:
    """The format of a file, and whether it is compressed; raises Refusal if its extension is unknown."""
    endings = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(endings) and endings[-1] in COMPRESSED
    if source.format != "auto":
        return source.format, compressed
    extension = endings[-2:-1] if compressed else endings[-1:]
    form = FORMATS.get(extension[0]) if extension else None
    if form is None:
        raise Refusal(f"{path} has an unknown extension: set `format` for this input, or restrict its path")
    return form, compressed


def line_ranges(path: Path, limit: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of about `limit` bytes that start and end at lines."""
    size = path.stat().st_size
    start = 0
    with path.open("rb") as file:
        while start < size:
            end = min(start + limit, size)
            file.seek(end)
            # A line may be larger than memory, so newlines are searched in blocks.
            while end < size and (block := file.read(BLOCK)):
                newline = block.find(b"\n")
                end += len(block) if newline < 0 else newline + 1
                if newline >= 0:
                    break
            yield start, end
            start = end
