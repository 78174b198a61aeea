"""A shard of documents as it goes from step to step: a file of documents, and what later steps said about them.

Only a step that changes text writes documents; the others write which go on and what was noted about them.
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
    """`base` has the documents, each of `notes` says which go on. `size` is in bytes of text; `digest` names the content."""

    number: int
    base: Path
    notes: tuple[Path, ...]
    digest: str
    count: int
    size: int

    def documents(self) -> Docs:
        """Those that are left."""
        notes = [json.loads((directory / NOTES).read_text()) for directory in self.notes]
        alive = [set(note["go_on"]) for note in notes]
        for document in read_documents(self.base / DOCUMENTS):
            if all(document.number in numbers for numbers in alive):
                for note in notes:
                    document.metadata.update(note["metadata"].get(str(document.number), {}))
                yield document


def rewritten(directory: Path, docs: Docs) -> Result:
    """Write a step's documents; what a Shard has to know of them."""
    size = 0

    def counted() -> Docs:
        nonlocal size
        for document in docs:
            size += len(document.text.encode())
            yield document

    count = write_documents(directory / DOCUMENTS, counted())
    return {"count": count, "size": size, "sha256": sha256_of(directory / DOCUMENTS)}


def noted(directory: Path, docs: Docs, keys: tuple[str, ...]) -> Result:
    """Write which documents a step lets go on, and the metadata under `keys` that it noted about them."""
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
    """Run the step `make(*arguments, rejects)` over a shard; with `keys` None it changes text: documents are written."""
    step = make(*arguments, Rejects(directory, reject_text))
    docs = step(shard.documents(), shard.number, world_size)
    return rewritten(directory, docs) if keys is None else noted(directory, docs, keys)
