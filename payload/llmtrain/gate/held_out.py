"""The held-out set: JSON lines of three kinds, which can be mixed in one file.

- `{"question": …, "answer": …}`, or `"messages": [{"role": …, "content": …}, …]` instead of the question: the generated text
  is compared with the answer;
- the same with `"choices": [...]`, where `answer` is one of them or its number from 0: the most likely choice is compared;
- `{"text": …}`: its likelihood is measured.

Other keys are ignored.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from llmtrain.data.rows import SOURCES
from llmtrain.exits import Refusal

Text = Annotated[str, Field(min_length=1)]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Text
    content: str


class Line(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(strict=True)
    question: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    choices: Annotated[list[Text], Field(min_length=2)] | None = None
    answer: Text | int | None = None
    text: Text | None = None

    @model_validator(mode="after")
    def is_of_one_kind(self) -> "Line":
        """A row is either a text, or one question with its answer."""
        questions = (self.question is not None) + (self.messages is not None)
        if self.text is not None:
            if questions or self.answer is not None or self.choices is not None:
                raise ValueError("a row with text must not have a question or an answer: make two rows of it")
        elif questions != 1 or self.answer is None:
            raise ValueError("a row needs text, or an answer with either question or messages")
        elif self.choices is None:
            if not isinstance(self.answer, str):
                raise ValueError("an answer is a string; numbers are for rows with choices")
        elif len(set(self.choices)) != len(self.choices):
            raise ValueError("two choices are the same")
        elif self.answer not in (self.choices if isinstance(self.answer, str) else range(len(self.choices))):
            raise ValueError("the answer is neither one of the choices nor the number of one, from 0")
        return self


@dataclass(frozen=True)
class Asked:
    """A question. `number` is its line in the file, `right` the number of the correct choice."""

    number: int
    question: str | None
    turns: list[dict[str, str]]
    answer: str = ""
    choices: list[str] = field(default_factory=list)
    right: int = 0


@dataclass(frozen=True)
class HeldOut:
    """The set by kind of row. `sha256` is that of the file."""

    sha256: str
    answers: list[Asked]
    choices: list[Asked]
    texts: list[str]

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows per metric, for the metrics that the set has."""
        kinds = {"exact": self.answers, "f1": self.answers}
        kinds |= {"choice": self.choices, "choice_normalised": self.choices}
        counts = {name: len(rows) for name, rows in kinds.items()} | {"bits_per_byte": len(self.texts)}
        return {name: count for name, count in counts.items() if count}


def read(path: Path) -> HeldOut:
    """Read a set; raises Refusal, which names the line but not its content.

    Duplicate rows are refused: they would count twice.
    """
    try:
        data = path.read_bytes()
        lines = data.decode().split("\n")
    except OSError as error:
        raise Refusal(f"cannot read the held-out set {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not UTF-8 at byte {error.start}: convert it") from error
    held_out = HeldOut(hashlib.sha256(data).hexdigest(), [], [], [])
    line_numbers: dict[str, int] = {}
    kind = TypeAdapter(Line)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = kind.validate_json(line)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'the row'}: {each['msg']}" for each in error.errors()
            )
            raise Refusal(f"{path} line {number} cannot be used: {faults}") from None
        key = row.model_dump_json()
        if key in line_numbers:
            raise Refusal(
                f"{path} line {number} is the same row as line {line_numbers[key]}: a row counts once, remove one of them"
            )
        line_numbers[key] = number
        keep(held_out, number, row)
    if not line_numbers:
        raise Refusal(f"{path} has no rows: add rows with a text, or with question and answer")
    return held_out


def keep(held_out: HeldOut, number: int, row: Line) -> None:
    """Add a row to `held_out` by its kind."""
    if row.text is not None:
        held_out.texts.append(row.text)
        return
    turns = [each.model_dump() for each in row.messages or []] or [
        {"role": "user", "content": row.question or ""}
    ]
    if row.choices is None:
        held_out.answers.append(Asked(number, row.question, turns, answer=str(row.answer)))
    else:
        right = row.answer if isinstance(row.answer, int) else row.choices.index(str(row.answer))
        held_out.choices.append(Asked(number, row.question, turns, choices=row.choices, right=right))


def digests(content: Any) -> set[str]:
    """Every sha256 that occurs anywhere in a JSON value."""
    if isinstance(content, dict):
        return set().union(*(digests(each) for each in (*content.keys(), *content.values())))
    if isinstance(content, list):
        return set().union(*map(digests, content))
    is_one = isinstance(content, str) and len(content) == 64 and not content.strip("0123456789abcdef")
    return {content} if is_one else set()


def refuse_learned(held_out: HeldOut, model: Path) -> bool:
    """Raise Refusal if this set is among the model's training files; return whether these are recorded at all.

    They are listed in the model's training.json, under `sources`, or beside the rows that it names.
    """
    hashes: set[str] = set()
    is_recorded = False
    for path in (model / "training.json", model.parent / "training.json"):
        try:
            training = json.loads(path.read_bytes())
            data = training.get("job", {}).get("data", {})
            beside = [Path(data[name]) / SOURCES for name in ("train", "eval") if data.get(name)]
            listed = [path.read_text().split() for path in beside if path.is_file()]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise Refusal(
                f"{path} does not record the training data ({error!r}): train again, or remove it"
            ) from error
        hashes |= digests([training, *listed])
        is_recorded = is_recorded or "sources" in training or bool(listed)
    if held_out.sha256 in hashes:
        raise Refusal(
            f"the held-out set (sha256 {held_out.sha256}) is among the training data of {model}: scores on data "
            "that was seen say nothing, use another set"
        )
    return is_recorded
