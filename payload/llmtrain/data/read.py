"""Reading: documents from JSONL, text, HTML, Parquet and CSV, compressed or not.

Invalid records are rejected with a reason. A broken file (truncated, or in another format) stops the run, or its remainder is
skipped, as `reading.broken_file` says; it is never mistaken for the end of the file.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from resiliparse.extract.html2text import extract_plain_text

from llmtrain.data.documents import BETWEEN_TURNS, Docs, Document, Reject, Rejects
from llmtrain.data.settings import Input, Reading
from llmtrain.data.sources import Piece
from llmtrain.exits import Refusal

# The errors of the libraries for a truncated file or another format.
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, csv.Error)


class NoDocument(ValueError):
    """A record is not a valid document; the arguments are rule and reason."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


class Read:
    """Reads the documents of a shard's pieces."""

    name = "read"

    def __init__(self, inputs: Sequence[Input], reading: Reading, rejects: Rejects) -> None:
        self.inputs, self.reading, self.rejects = inputs, reading, rejects
        self.limit = reading.document_mb << 20

    def __call__(self, pieces: list[Piece], rank: int = 0, world_size: int = 1) -> Docs:
        with self.rejects.of(self.name, rank) as reject:
            for piece in pieces:
                try:
                    yield from self.piece(piece, self.inputs[piece.input], reject)
                except BROKEN as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise Refusal(f"cannot read {piece.path}: {error.strerror}") from error
                    self.broken(piece, str(error) or type(error).__name__, reject)

    def broken(self, piece: Piece, why: str, reject: Reject) -> None:
        """Refuse or skip a broken file, as configured."""
        if self.reading.broken_file == "refuse":
            raise Refusal(
                f"{piece.path} cannot be read to its end as {piece.format}: {why}; fetch it again, "
                "or set `reading.broken_file: skip` to keep only what precedes the error"
            )
        reject(Document("", str(piece.path), {"source": str(piece.path)}), "broken_file", why)

    def piece(self, piece: Piece, source: Input, reject: Reject) -> Docs:
        """The documents of a file, or of a range of it."""
        for place, record in self.records(piece, source):
            where = f"{piece.path}{place}"
            metadata: dict[str, Any] = {"source": str(piece.path)}
            if source.domain:
                metadata["domain"] = source.domain
            try:
                if isinstance(record, NoDocument):
                    raise record
                yield self.document(record, where, metadata, piece, source)
            except NoDocument as error:
                reject(Document("", where, metadata), error.rule, str(error))

    def document(
        self, record: Any, where: str, metadata: dict[str, Any], piece: Piece, source: Input
    ) -> Document:
        """The document of a record; raises NoDocument."""
        if isinstance(record, bytes):
            text = self.decoded(record, source)
            if piece.format == "jsonl":
                return self.from_fields(parsed(text), where, metadata, source)
            return Document(
                self.sound(text_of_html(text) if piece.format == "html" else text), where, metadata
            )
        return self.from_fields(record, where, metadata, source)

    def from_fields(self, record: Any, where: str, metadata: dict[str, Any], source: Input) -> Document:
        """The document of a record with named fields; raises NoDocument."""
        if not isinstance(record, dict):
            raise NoDocument("no_object", f"the line holds {type(record).__name__}, not an object")
        identity = record.get(source.id) if source.id else None
        if source.id and not isinstance(identity, str | int):
            raise NoDocument("no_id", f"field {source.id!r} holds {type(identity).__name__}, not text")
        name = str(identity) if source.id else where
        messages = record.get(source.messages)
        if messages is not None:
            if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
                raise NoDocument(
                    "no_messages", f"field {source.messages!r} is not a list of role and content"
                )
            metadata["messages"] = [
                {"role": self.sound(message["role"]), "content": self.sound(message["content"])}
                for message in messages
            ]
            text = BETWEEN_TURNS.join(message["content"] for message in metadata["messages"])
            return Document(text, name, metadata)
        content = record.get(source.text)
        if not isinstance(content, str):
            raise NoDocument("no_text", f"field {source.text!r} holds {type(content).__name__}, not text")
        return Document(self.sound(content), name, metadata)

    def decoded(self, raw: bytes, source: Input) -> str:
        """Decode bytes by the encoding of the input; raises NoDocument."""
        try:
            return raw.decode(source.encoding)
        except UnicodeDecodeError as error:
            if self.reading.broken_text == "replace":
                return raw.decode(source.encoding, "replace")
            raise NoDocument("broken_text", f"byte {error.start} is not valid {source.encoding}") from error

    def sound(self, text: str) -> str:
        """Return the text if it is valid Unicode, as JSON escapes can contain lone surrogates; raises NoDocument."""
        if len(text) > self.limit:
            raise NoDocument("gigantic", f"{len(text)} letters, reading.document_mb allows {self.limit}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.reading.broken_text == "replace":
                return text.encode("utf-8", "replace").decode()
            raise NoDocument("broken_text", f"character {error.start} is a lone surrogate") from error
        return text

    def records(self, piece: Piece, source: Input) -> Iterator[tuple[str, Any]]:
        """The raw records of a file and their positions."""
        if piece.format == "parquet":
            for row, record in enumerate(parquet_rows(piece.path, source)):
                yield f"#{row}", record
            return
        with opened(piece.path) as file:
            if piece.start:
                file.seek(piece.start)
            if piece.format == "csv":
                yield from self.csv_rows(file, piece, source)
            elif piece.format == "jsonl" or (piece.format == "text" and source.documents == "line"):
                yield from self.lines(file, piece)
            else:
                raw = file.read(self.limit + 1)
                yield "", raw if len(raw) <= self.limit else self.gigantic()

    def gigantic(self) -> NoDocument:
        """The rejection of a document that is too large to read."""
        return NoDocument("gigantic", f"more than reading.document_mb: {self.reading.document_mb}")

    def lines(self, file: IO[bytes], piece: Piece) -> Iterator[tuple[str, Any]]:
        """The lines of a file or range with their offsets. At most the allowed size of a line is in memory."""
        plain = piece.path.suffix.lower() not in {".gz", ".bz2", ".xz", ".zst"}
        place = piece.start
        while (not plain or place < piece.end) and (raw := file.readline(self.limit + 1)):
            start, place = place, place + len(raw)
            if len(raw) > self.limit:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(self.limit)
                    place += len(raw)
                yield f"#{start}", self.gigantic()
            elif raw.strip():
                yield f"#{start}", raw

    def csv_rows(self, file: IO[bytes], piece: Piece, source: Input) -> Iterator[tuple[str, Any]]:
        """The rows of a CSV file with a header, and their numbers."""
        csv.field_size_limit(self.limit)
        # Invalid bytes become lone surrogates, which `sound` rejects, so one broken row does not end the file.
        errors = "surrogateescape" if source.encoding == "utf-8" else "strict"
        text = io.TextIOWrapper(file, source.encoding, errors, newline="")
        endings = [suffix.lower() for suffix in piece.path.suffixes]
        rows = csv.DictReader(text, delimiter="\t" if ".tsv" in endings else ",", strict=True)
        if source.text not in (rows.fieldnames or ()):
            raise Refusal(
                f"{piece.path} has columns {', '.join(rows.fieldnames or ['none'])}: "
                f"set `text` of this input, now {source.text!r}, to one of them"
            )
        try:
            for number, row in enumerate(rows):
                yield f"#{number}", row
        except UnicodeDecodeError as error:
            raise EOFError(f"byte {error.start} is not valid {source.encoding}") from error


def is_message(message: Any) -> bool:
    """Whether a turn has a role and a content, both strings."""
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def parsed(line: str) -> Any:
    """Parse a line of JSONL; raises NoDocument."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NoDocument("no_json", f"the line is not JSON: {type(error).__name__}") from error


def opened(path: Path) -> IO[bytes]:
    """Open a file, decompressing it by its extension."""
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".bz2":
            return cast(IO[bytes], bz2.open(path, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        case ".zst":
            return cast(
                IO[bytes], io.BufferedReader(arrow("pyarrow").input_stream(str(path), compression="zstd"))
            )
    return path.open("rb")


def arrow(module: str) -> Any:
    """Import pyarrow or one of its modules, which only Parquet and zstd need; raises Refusal."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refusal("Parquet and .zst need pyarrow, which is not installed: install it") from error


def parquet_rows(path: Path, source: Input) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file with the needed columns, one batch in memory at a time."""
    parquet = arrow("pyarrow.parquet")
    errors = arrow("pyarrow").lib.ArrowException
    fields = {source.text, source.messages, *([source.id] if source.id else [])}
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in fields]
            if not {source.text, source.messages} & set(columns):
                raise Refusal(
                    f"{path} has columns {', '.join(file.schema_arrow.names)}: set `text` or `messages` "
                    f"of this input, now {source.text!r} and {source.messages!r}, to one of them"
                )
            for batch in file.iter_batches(1024, columns=columns):
                yield from batch.to_pylist()
    except (errors, UnicodeDecodeError) as error:
        raise EOFError(str(error).split("\n")[0]) from error


def text_of_html(page: str) -> str:
    """The text of an HTML page's main content, or all that it shows if its main content is less than a quarter of it."""
    whole, main = (
        extract_plain_text(page, main_content=main_content, list_bullets=False, alt_texts=False)
        for main_content in (False, True)
    )
    lines = (main if len(main) * 4 >= len(whole) else whole).split("\n")
    return "\n".join(line.strip() for line in lines if line.strip())
