"""Tokenizes documents by the tokenizer of a model."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from llmcore.files import sha256_of
from llmtrain.data.chat import Chat, NotLearnable
from llmtrain.data.documents import Document, Rejects
from llmtrain.data.rows import tokenizer_digest
from llmtrain.data.shards import Shard
from llmtrain.data.work_directory import Result, key_of
from llmtrain.exits import Refusal

TOKENS = "tokens.npz"
LINES = "documents.jsonl"
COUNTED = (
    "languages",
    "domains",
    "lengths",
    "personal",
)  # counted per document; the last counts replacements


class Tokenize:
    """Tokenizes documents. Plain text is learned entirely, and ends with EOS."""

    name = "tokenize"

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                model, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise Refusal(
                f"{model} has no tokenizer that can be loaded: {str(error).splitlines()[0]}"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise Refusal(
                f"the tokenizer of {model} has no EOS token: a model trained with it would never stop"
            )
        # Documents longer than the model's context are split or dropped later, so no warning.
        self.tokenizer.model_max_length = 1 << 40
        self.model = model
        self.chat: Chat | None = None

    def tokens(self, document: Document) -> tuple[list[int], list[int]]:
        """Token ids, and 1 for each that is learned; raises NotLearnable."""
        messages = document.metadata.get("messages")
        if messages is not None:
            self.chat = self.chat or Chat(self.tokenizer, str(self.model))
            return self.chat.tokens(messages)
        ids: list[int] = self.tokenizer(document.text)["input_ids"]
        if not ids or ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids, [1] * len(ids)


def digest(model: Path) -> str:
    """The sha256 of the tokenizer's files and of its chat template, in hex."""
    files = [
        model / name for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    ]
    return key_of(tokenizer_digest(model), [sha256_of(file) for file in files if file.is_file()])


def sha256_of_text(text: str) -> str:
    """The sha256 of a text, in hex, by which `data where` finds a document."""
    return hashlib.sha256(text.encode()).hexdigest()


def tokenize(directory: Path, model: Path, rejects_text: bool, shard: Shard) -> Result:
    """Write the token ids, learned flags and document starts of a shard; return the counts for the report."""
    step = Tokenize(model)
    ids: list[NDArray[numpy.int32]] = []
    learned: list[NDArray[numpy.uint8]] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    characters = 0
    with (
        Rejects(directory, rejects_text).of(step.name, shard.number) as reject,
        (directory / LINES).open("w", encoding="utf-8") as lines,
    ):
        for document in shard.documents():
            try:
                these, yes = step.tokens(document)
            except NotLearnable as error:
                reject(document, error.rule, str(error))
                continue
            ids.append(numpy.array(these, numpy.int32))
            learned.append(numpy.array(yes, numpy.uint8))
            characters += len(document.text)
            counts["languages"][document.metadata.get("language", "unknown")] += 1
            counts["domains"][document.metadata.get("domain", "none")] += 1
            counts["lengths"][str(max(0, len(these) - 1).bit_length())] += 1
            counts["personal"].update(document.metadata.get("personal", {}))
            line = {
                "id": document.id,
                "source": document.metadata["source"],
                "sha256": sha256_of_text(document.text),
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    starts = numpy.cumsum([0, *map(len, ids)], dtype=numpy.int64)
    with (directory / TOKENS).open("wb") as file:
        numpy.savez(
            file,
            ids=numpy.concatenate([*ids, numpy.empty(0, numpy.int32)]),
            learned=numpy.concatenate([*learned, numpy.empty(0, numpy.uint8)]),
            starts=starts,
        )
    return {
        "documents": len(ids),
        "tokens": int(starts[-1]),
        "learned": int(sum(int(each.sum()) for each in learned)),
        "characters": characters,
        "pad": step.tokenizer.eos_token_id
        if step.tokenizer.pad_token_id is None
        else step.tokenizer.pad_token_id,
        "counts": {name: dict(sorted(count.items())) for name, count in counts.items()},
        "sha256": sha256_of(directory / LINES) + sha256_of(directory / TOKENS),
    }
