"""`llm-train feedback pack`: turns examples for KTO and DPO into rows of tokens in which answers are compared.

The answers of one comparison are in one row (`run.preferences` says how they are distinguished): for DPO a chosen and a rejected
one, for KTO an answer, and the previous example's answer to the same prompt.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy

from llmcore.files import write_aside
from llmtrain import exits
from llmtrain.data.chat import Chat, NotLearnable
from llmtrain.data.pack import Piece, best_fit, row_of
from llmtrain.data.rows import SOURCES, tokenizer_digest, write_index, write_shard
from llmtrain.data.tokenization import Tokenize
from llmtrain.feedback.export import read_export

GOOD, BAD, OTHER = 1, 2, 3  # as in `run.preferences`, which needs torch
SHARD = 4096  # rows
Messages = list[dict[str, str]]


def answer(chat: Chat, prompt: Messages, reply: Messages, mark: int) -> Piece:
    """Prompt and answer as tokens; those of the last turn are marked. Raises NotLearnable."""
    ids, learned = chat.tokens([*prompt, *reply])
    flags = numpy.array(learned, numpy.uint8)
    end = int(numpy.flatnonzero(flags)[-1]) + 1
    before = numpy.flatnonzero(flags[:end] == 0)
    flags[: int(before[-1]) + 1 if len(before) else 0] = 0
    return Piece(numpy.array(ids, numpy.int32), flags * numpy.uint8(mark), 0)


def compared(chat: Chat, kind: str, example: dict[str, Any], other: dict[str, Any]) -> list[Piece]:
    """The answers of one comparison; raises NotLearnable."""
    prompt = example["prompt"]
    if kind == "dpo":
        return [answer(chat, prompt, example["chosen"], GOOD), answer(chat, prompt, example["rejected"], BAD)]
    own = answer(chat, prompt, example["completion"], GOOD if example["label"] else BAD)
    return [own, answer(chat, prompt, other["completion"], OTHER)]


def pack(directory: Path, model: Path, seq_len: int, out: Path) -> int:
    """Write rows to a new folder; examples that do not fit go to its `rejects.jsonl`."""
    kind, examples, digest = read_export(directory)
    if kind not in ("kto", "dpo"):
        raise exits.Refusal(
            f"{directory} contains conversations for {kind}: add {kind}.jsonl to `inputs` of `llm-train data run` instead"
        )
    if kind == "kto" and len(examples) < 2:
        raise exits.Refusal(
            f"{directory} has one example: KTO compares answers to different prompts, so provide two or more"
        )
    if out.exists():
        raise exits.Refusal(f"--out is {out}, which exists: specify a new folder")
    tokenizer = Tokenize(model).tokenizer
    chat = Chat(tokenizer, str(model))
    groups: list[list[Piece]] = []
    rejects = []
    for number, example in enumerate(examples):
        try:
            pieces = compared(chat, kind, example, examples[number - 1])
            if (length := sum(len(piece.ids) for piece in pieces)) > seq_len:
                raise NotLearnable(
                    "long", f"its answers have {length} tokens in total, but a row has {seq_len}"
                )
        except NotLearnable as error:
            rejects.append({"id": example["id"], "rule": error.rule, "reason": str(error)})
            continue
        groups.append(pieces)
    if not groups:
        raise exits.Refusal(
            f"no example of {directory} fits into a row of {seq_len} tokens: {rejects[0]['reason']}"
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    packed = best_fit([sum(len(piece.ids) for piece in group) for group in groups], seq_len)
    rows = [row_of([piece for group in row for piece in groups[group]], seq_len, pad) for row in packed]
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True, mode=0o700)
    shards = [
        write_shard(aside, place // SHARD, rows[place : place + SHARD])
        for place in range(0, len(rows), SHARD)
    ]
    (aside / SOURCES).write_text(f"{digest}  {kind}.jsonl\n")
    write_aside(aside / "rejects.jsonl", "".join(json.dumps(each) + "\n" for each in rejects))
    more = {
        "objective": kind,
        "documents_a_row": max(2 * len(row) for row in packed),
        "examples": len(groups),
    }
    write_index(aside, seq_len, tokenizer_digest(model), shards, **more)
    aside.rename(out)
    print(json.dumps({"rows": len(rows), "examples": len(groups), "rejected": len(rejects)}))
    return exits.DONE
