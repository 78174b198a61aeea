"""`llm-train data where`: which files of rows, and which models, hold a document. What an erasure request asks.

A document is named by its id, by its whole text, or by any part of its text; a part is looked for in what the working
directory has, before personal data was replaced. Copies of it that were dropped are named too: they are still in the raw files.
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


def where(asked: str, data: list[Path], settings: Settings | None, models: Path | None) -> dict[str, Any]:
    """All that holds what is asked for; raises Refusal where a data set cannot be read."""
    ids = {asked}
    texts = {sha256_of_text(asked)}
    if settings is not None:
        cleaned = Clean(settings.clean, Rejects(settings.work)).text(asked)
        texts.add(sha256_of_text(cleaned))
        ids |= set(holding(cleaned, settings.work))
    found: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    for directory in data:
        rows = Rows(directory)
        digests[rows.digest] = str(directory)
        for shard in rows.index["shards"]:
            for line in lines_of(directory / shard["documents"]):
                if line["id"] in ids or line["sha256"] in texts:
                    found.append(
                        {"data": str(directory), "digest": rows.digest, "file": shard["file"], **line}
                    )
        # What is the same as one of them was dropped for that reason.
        named = ids | {line["id"] for line in found}
        for line in rejected(directory / REJECTS):
            original = (
                line["reason"].removeprefix("the same as ") if line["rule"].endswith("_duplicate") else None
            )
            if line["id"] in named or original in named:
                dropped.append({"data": str(directory), **{key: line[key] for key in line if key != "text"}})
    holding_data = {line["digest"] for line in found}
    return {"rows": found, "dropped": dropped, "models": trained_on(models, holding_data) if models else []}


def holding(part: str, work: Path) -> Iterator[str]:
    """The ids of documents that have a text in them; blanks and line ends do not matter."""
    wanted = " ".join(part.split())
    if not wanted:
        return
    for path in sorted(work.glob(f"clean/*/{DOCUMENTS}")):
        if path.parent.suffix == ".partial":
            continue
        for document in read_documents(path):
            if wanted in " ".join(document.text.split()):
                yield document.id


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lineage of one file of rows."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, EOFError, ValueError) as error:
        raise Refusal(
            f"cannot read {path}: {error}; make the data set again, what it holds cannot be told"
        ) from error


def rejected(path: Path) -> Iterator[dict[str, Any]]:
    """The reject file's lines."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise Refusal(f"cannot read {path}: {error}; make the data set again") from error


def trained_on(models: Path, digests: set[str]) -> list[dict[str, str]]:
    """The models below a directory whose `training.json` says that they saw one of the data sets."""
    if not models.is_dir():
        raise Refusal(f"--models {models} is no directory: give the one that the models lie in")
    found = []
    for path in sorted(models.rglob("training.json")):
        try:
            data = json.loads(path.read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(f"{path} does not say what was trained on ({error!r}): correct it") from error
        for digest in [data] if isinstance(data, str) else data:
            if digest in digests:
                found.append({"model": str(path.parent), "digest": digest})
    return found
