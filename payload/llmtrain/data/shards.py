"""A shard of documents as it passes through the steps: a file of documents, and the notes of later steps.

Only steps that change text write documents; the others write notes on which documents are kept, and their metadata.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.files import sha256_of
from llmtrain.data.documents import Docs, Rejects, read_documents, write_documents
from llmtrain.data.work_directory import Result

DOCUMENTS = "documents.jsonl.gz"
NOTES = "notes.json"
Step = Callable[..., Docs]


@dataclass(frozen=True)
class Shard:
    """`base` has the documents; each of `notes` says which are kept. `size` is in bytes of text; `digest` identifies the
    content."""

    number: int
    base: Path
    notes: tuple[Path, ...]
    digest: str
    count: int
    size: int

    def documents(self) -> Docs:
        """The documents that are left."""
        notes = [json.loads((directory / NOTES).read_text()) for directory in self.notes]
        alive = [set(note["go_on"]) for note in notes]
        for document in read_documents(self.base / DOCUMENTS):
            if all(document.number in numbers for numbers in alive):
                for note in notes:
                    document.metadata.update(note["metadata"].get(str(document.number), {}))
                yield document


def rewritten(directory: Path, docs: Docs) -> Result:
    """Write the documents of a step; return the facts of a Shard."""
    size = 0

    def counted() -> Docs:
        nonlocal size
        for document in docs:
            size += len(document.text.encode())
            yield document

    count = write_documents(directory / DOCUMENTS, counted())
    return {"count": count, "size": size, "sha256": sha256_of(directory / DOCUMENTS)}


def noted(directory: Path, docs: Docs, keys: tuple[str, ...]) -> Result:
    """Write which documents a step keeps, and the metadata under `keys` that it set."""
    go_on, metadata, size = [], {}, 0
    for document in docs:
        go_on.append(document.number)
        size += len(document.text.encode())
        if keys:
            metadata[str(document.number)] = {key: document.metadata[key] for key in keys}
    (directory / NOTES).write_text(json.dumps({"go_on": go_on, "metadata": metadata}, ensure_ascii=False))
    return {"count": len(go_on), "size": size, "sha256": sha256_of(directory / NOTES)}


def apply(
    directory: Path,
    make: Callable[..., Step],
    arguments: tuple[Any, ...],
    reject_text: bool,
    shard: Shard,
    world_size: int,
    keys: tuple[str, ...] | None,
) -> Result:
    """Apply the step `make(*arguments, rejects)` to a shard. If `keys` is None, it changes text, so documents are written."""
    step = make(*arguments, Rejects(directory, reject_text))
    docs = step(shard.documents(), shard.number, world_size)
    return rewritten(directory, docs) if keys is None else noted(directory, docs, keys)
