"""`llm-train data where`: the data files and models that contain a document, to answer an erasure request.

A document is given by its id, its whole text, or any part of it; parts are searched for in the working directory, in the
text before personal data was replaced. Dropped duplicates are listed, too, as the raw files still contain them.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.data.clean import Clean
from llmtrain.data.documents import Rejects, read_documents
from llmtrain.data.output import REJECTS
from llmtrain.data.rows import Rows
from llmtrain.data.settings import Settings
from llmtrain.data.shards import DOCUMENTS
from llmtrain.data.tokenization import sha256_of_text
from llmtrain.exits import Refusal


def where(document: str, data: list[Path], settings: Settings | None, models: Path | None) -> dict[str, Any]:
    """Where a document occurs, as JSON; raises Refusal if a data set cannot be read."""
    ids = {document}
    texts = {sha256_of_text(document)}
    if settings is not None:
        cleaned = Clean(settings.clean, Rejects(settings.work)).text(document)
        texts.add(sha256_of_text(cleaned))
        ids |= set(holding(cleaned, settings.work))
    matches: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    for directory in data:
        rows = Rows(directory)
        digests[rows.digest] = str(directory)
        for shard in rows.index["shards"]:
            for line in lines_of(directory / shard["documents"]):
                if line["id"] in ids or line["sha256"] in texts:
                    matches.append(
                        {"data": str(directory), "digest": rows.digest, "file": shard["file"], **line}
                    )
        # Duplicates of a found document name it as the reason why they were dropped.
        all_ids = ids | {line["id"] for line in matches}
        for line in rejected(directory / REJECTS):
            original = (
                line["reason"].removeprefix("the same as ") if line["rule"].endswith("_duplicate") else None
            )
            if line["id"] in all_ids or original in all_ids:
                dropped.append({"data": str(directory), **{key: line[key] for key in line if key != "text"}})
    holding_data = {line["digest"] for line in matches}
    return {"rows": matches, "dropped": dropped, "models": trained_on(models, holding_data) if models else []}


def holding(part: str, work: Path) -> Iterator[str]:
    """The ids of the documents that contain a text, ignoring differences in whitespace."""
    text = " ".join(part.split())
    if not text:
        return
    for path in sorted(work.glob(f"clean/*/{DOCUMENTS}")):
        if path.parent.suffix == ".partial":
            continue
        for document in read_documents(path):
            if text in " ".join(document.text.split()):
                yield document.id


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a lineage file; raises Refusal."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, EOFError, ValueError) as error:
        raise Refusal(
            f"cannot read {path}: {error}; build the data set again: its documents are unknown"
        ) from error


def rejected(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the reject file; raises Refusal."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise Refusal(f"cannot read {path}: {error}; build the data set again") from error


def trained_on(models: Path, digests: set[str]) -> list[dict[str, str]]:
    """The models below a directory that were trained on one of the data sets, by their training.json; raises Refusal."""
    if not models.is_dir():
        raise Refusal(f"--models {models} is not a directory: specify the one that contains the models")
    matches = []
    for path in sorted(models.rglob("training.json")):
        try:
            data = json.loads(path.read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(f"{path} does not record the training data ({error!r}): correct it") from error
        for digest in [data] if isinstance(data, str) else data:
            if digest in digests:
                matches.append({"model": str(path.parent), "digest": digest})
    return matches
