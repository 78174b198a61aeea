"""Documents as they pass through the steps, and the records of rejected ones.

A step is called as `step(docs, rank, world_size) -> docs`. It uses only `text`, `id` and `metadata`, so that it also runs in
datatrove's executors, whose documents have the same attributes. The turns of a conversation are in `metadata["messages"]`;
its `text` is their joined content, for steps that only read.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

BETWEEN_TURNS = "\n\n"
Reject = Callable[["Document", str, str], None]


@dataclass(slots=True)
class Document:
    """A text or a conversation, and its origin."""

    text: str
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)
    number: int = -1  # position in the shard that it was read from


Docs = Iterator[Document]


def parts(document: Document) -> list[str]:
    """The texts of a document: those of a conversation's turns, or its single text."""
    messages = document.metadata.get("messages")
    return [document.text] if messages is None else [message["content"] for message in messages]


def replace_parts(document: Document, texts: list[str]) -> None:
    """Replace `parts(document)` by `texts`."""
    messages = document.metadata.get("messages")
    if messages is None:
        document.text = texts[0]
        return
    document.metadata["messages"] = [
        {**message, "content": text} for message, text in zip(messages, texts, strict=True)
    ]
    document.text = BETWEEN_TURNS.join(texts)


@dataclass(frozen=True)
class Rejects:
    """Records rejected documents in `directory/STEP-RANK.jsonl`, each with id, source, reason and rule."""

    directory: Path
    text: bool = False  # the text as well; off by default, since it may be sensitive

    @contextmanager
    def of(self, step: str, rank: int) -> Iterator[Reject]:
        """Yields the function that records one. The file gets its name when it is complete."""
        path = self.directory / f"{step}-{rank:05d}.jsonl"
        aside = path.with_suffix(".partial")
        self.directory.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:

            def reject(document: Document, rule: str, reason: str) -> None:
                line = {
                    "id": document.id,
                    "source": document.metadata.get("source"),
                    "step": step,
                    "rule": rule,
                    "reason": reason,
                }
                if self.text:
                    line["text"] = document.text
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

            yield reject
        aside.replace(path)


def write_documents(path: Path, docs: Docs) -> int:
    """Write documents as gzipped JSONL and return their number. The same documents give the same bytes."""
    count = 0
    # Level 1: the file is short-lived, and a better ratio is not worth the time.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
        for document in docs:
            line = {"id": document.id, **document.metadata}
            if "messages" not in line:
                line["text"] = document.text
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def read_documents(path: Path) -> Docs:
    """The documents that `write_documents` wrote, numbered from 0."""
    with gzip.open(path, "rb") as file, io.BufferedReader(cast(io.RawIOBase, file), 1 << 20) as lines:
        for number, raw in enumerate(lines):
            line = json.loads(raw)
            identity = line.pop("id")
            if "messages" in line:
                text = BETWEEN_TURNS.join(message["content"] for message in line["messages"])
            else:
                text = line.pop("text")
            yield Document(text, identity, line, number)
