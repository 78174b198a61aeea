"""`llm-train annotate export`: turns examples into tasks for Label Studio, and writes the data for recognizing them later.

The data of a task contains our own id, since Label Studio assigns new ids at each import. The order of tasks, and of the answers
of a task, comes from HMACs with a key that stays here: annotators cannot tell which answer was which.
"""

import argparse
import hashlib
import hmac
import json
import math
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from llmcore.config import load
from llmcore.files import replacing
from llmcore.privileges import become_owner
from llmtrain import exits
from llmtrain.annotation.controls import OBJECTS, Labels, configuration
from llmtrain.feedback.export import Messages, Rejected, lines_of, read_export

ID = "llmkeep_id"
ANSWERS = {"better": (2,), "rating": (1,), "correction": (1,), "labels": (0, 1)}  # that a task of a kind has
KEY, ITEMS, REPORT = "key", "items.jsonl", "annotation.json"
TASKS, OVERLAP, CONFIGURATION = (
    "label-studio/tasks.json",
    "label-studio/overlap.json",
    "label-studio/labels.xml",
)


@dataclass(frozen=True)
class Item:
    """The subject of a task: the example's id, our id, a conversation, and the answers to it."""

    id: str
    task: str
    prompt: Messages
    answers: list[str]


def mac(key: bytes, purpose: str, text: str) -> bytes:
    """32 bytes that reveal nothing without the key."""
    return hmac.digest(key, f"{purpose}\0{text}".encode(), "sha256")


def answers_of(key: bytes, item: Item) -> list[str]:
    """The answers in the order of the task."""
    return item.answers[::-1] if mac(key, "order", item.task)[0] & 1 else item.answers


def written_out(turns: Messages) -> str:
    """A conversation as one text."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return "\n\n".join(f"{each['role']}:\n{each['content']}" for each in turns)


def data_of(key: bytes, kind: str, item: Item) -> dict[str, str]:
    """The data of an item's task: our id and what its objects show."""
    answers = answers_of(key, item)
    whole = [*item.prompt, *({"role": "assistant", "content": each} for each in answers)]
    texts = {"prompt": written_out(item.prompt), "text": written_out(whole)}
    texts |= zip(("a", "b"), answers, strict=False)
    if answers:
        texts["answer"] = answers[0]
    return {ID: item.task, **{name: texts[name] for name in OBJECTS[kind]}}


def turns_of(value: Any) -> Messages:
    """A text, or messages, as messages; raises Rejected."""
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise Rejected("no_text", "it has neither a text nor messages, but needs one of them")
    for each in turns:
        if not isinstance(each, dict) or each.keys() != {"role", "content"}:
            raise Rejected("no_plain_text", "a message must have a role and a content, and nothing else")
        if not all(isinstance(text, str) and text.strip() for text in each.values()):
            raise Rejected("no_plain_text", "the text of a message is empty or not a string")
    return turns


def parsed(line: dict[str, Any]) -> tuple[Messages, list[str]]:
    """Prompt and answers of an example, or of a document; raises Rejected."""
    if "prompt" in line:
        answers = line.get(
            "answers", [line[each] for each in ("chosen", "rejected", "completion") if each in line]
        )
        if not isinstance(answers, list):
            raise Rejected("answers", "`answers` is not a list")
        return turns_of(line["prompt"]), [turns_of(each)[-1]["content"] for each in answers]
    turns = turns_of(line.get("messages", line.get("text")))
    if len(turns) > 1 and turns[-1]["role"] == "assistant":
        return turns[:-1], [turns[-1]["content"]]
    return turns, []


def read_lines(path: Path) -> tuple[list[Any], str]:
    """The lines of a JSON-lines file, each with an id, and the file's digest; raises Refusal."""
    try:
        data = path.read_bytes()
        lines = [json.loads(line) for line in StringIO(data.decode()) if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise exits.Refusal(
            f"--examples: {path} cannot be read as JSON lines of UTF-8 ({error}): specify such a file, or a folder written by "
            f"`llm-train feedback export`"
        ) from error
    for each in lines:
        if isinstance(each, dict):
            content = json.dumps(each, sort_keys=True)
            each.setdefault("id", hashlib.sha256(content.encode()).hexdigest()[:32])
    return lines, hashlib.sha256(data).hexdigest()


def items(lines: list[Any], kind: str, key: bytes) -> Iterator[Item | dict[str, Any]]:
    """For each line its item, or why there is none."""
    ids: set[str] = set()
    for number, line in enumerate(lines, 1):
        name = line.get("id") if isinstance(line, dict) else None
        printable_id = str(name).encode("utf-8", "backslashreplace").decode()
        try:
            if not isinstance(name, str) or not name:
                raise Rejected("malformed", f"line {number} is not an object, or its id is not text")
            if name in ids:
                raise Rejected("duplicate_id", f"line {number} repeats the id of an earlier line")
            ids.add(name)
            prompt, answers = parsed(line)
            if len(answers) not in ANSWERS[kind]:
                numbers = " or ".join(map(str, ANSWERS[kind]))
                raise Rejected("answers", f"there are {len(answers)} answers, but {kind} needs {numbers}")
            if len(answers) == 2 and answers[0].strip() == answers[1].strip():
                raise Rejected("same", "both answers are the same")
            lines_of([{"texts": [name, prompt, answers]}]).encode()
        except UnicodeEncodeError:
            yield {
                "id": printable_id,
                "rule": "no_plain_text",
                "reason": "half of a surrogate pair, which UTF-8 cannot encode",
            }
        except Rejected as rejected:
            yield {"id": printable_id, **asdict(rejected)}
        else:
            yield Item(name, mac(key, "task", name).hex()[:32], prompt, answers)


def export(arguments: argparse.Namespace) -> int:
    """Write tasks, configuration, key and report to a new folder, and print the report."""
    become_owner(arguments.examples, arguments.out)
    kind, out = arguments.kind, arguments.out
    if (arguments.labels is None) == (kind == "labels"):
        raise exits.Refusal(
            f"--kind is {kind} and --labels is {arguments.labels}: kind labels, and no other, requires --labels"
        )
    labels = load(arguments.labels, Labels) if arguments.labels else None
    if out.exists():
        raise exits.Refusal(f"--out is {out}, which exists: specify a new folder")
    lines, digest = (
        read_export(arguments.examples)[1:] if arguments.examples.is_dir() else read_lines(arguments.examples)
    )
    key = secrets.token_bytes(32)
    read = list(items(lines, kind, key))
    entries = sorted((each for each in read if isinstance(each, Item)), key=lambda each: each.task)
    rejects = [each for each in read if not isinstance(each, Item)]
    rejected = dict(sorted(Counter(each["rule"] for each in rejects).items()))
    if not entries:
        raise exits.Refusal(
            f"{arguments.examples} contains nothing to annotate by {kind}: {rejected or 'it is empty'}"
        )
    by_chance = sorted(entries, key=lambda each: mac(key, "overlap", each.task))
    double = {each.task for each in by_chance[: math.ceil(arguments.overlap * len(entries))]}
    tasks = {TASKS: entries, OVERLAP: [each for each in entries if each.task in double]}
    content = lines_of([asdict(each) for each in entries])
    report = {
        "annotation": kind,
        "labels": labels.model_dump() if labels else None,
        "examples": digest,
        "tasks": len(entries),
        "overlap": len(double),
        "rejected": rejected,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    files = {
        KEY: key.hex() + "\n",
        ITEMS: content,
        "rejects.jsonl": lines_of(rejects),
        CONFIGURATION: configuration(kind, labels),
        **{
            name: json.dumps(
                [{"data": data_of(key, kind, each)} for each in some], ensure_ascii=False, indent=1
            )
            + "\n"
            for name, some in tasks.items()
        },
        REPORT: json.dumps(report, indent=1, ensure_ascii=False) + "\n",  # last: with it the export is whole
    }
    (out / TASKS).parent.mkdir(parents=True, mode=0o700)
    out.chmod(0o700)
    for name, text in files.items():
        with replacing(out / name) as aside:
            aside.write_text(text, encoding="utf-8")
    print(files[REPORT], end="")
    return exits.DONE
