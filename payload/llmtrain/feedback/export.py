"""`llm-train feedback export`: turns ratings into training examples in TRL's conversational formats.

KTO (Ethayarajh et al. 2024) learns from thumbs, DPO (Rafailov et al. 2023) from corrections, which are the chosen answers, SFT
from the best answers and from corrections. Only exchanges of tenants that consented have a text, so only they are exported.
"""

import argparse
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from llmcore import ratings
from llmcore.files import flush
from llmcore.privileges import become_owner
from llmtrain import exits

FIELD = ratings.FIELD
RUN = 13  # words in a row that no example may share with the held-out set
Example = dict[str, Any]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Rejected(Exception):
    """Why a rating yields no example."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Rated:
    """An exchange with its rating. `good`: None if neither thumb nor stars decide it."""

    transaction: str
    subject: tuple[str, str]
    time: str
    prompt: Messages
    answer: str
    good: bool | None
    best: bool
    correction: str | None  # an expert's before the subject's own


def joined(
    rating: ratings.Record, review: ratings.Record | None, answers: dict[str, ratings.Record]
) -> Rated:
    """The rated exchange, with an expert's review applied if there is one; raises Rejected."""
    exchange = answers.get(rating[ratings.TRANSACTION])
    if exchange is None:
        raise Rejected(
            "no_text",
            "prompt and answer were not kept: the tenant does not consent, or the answer was cut off",
        )
    if not all(each.keys() >= ratings.NAMES for each in (rating, exchange, review or exchange)):
        raise Rejected("malformed", "it lacks a tenant or a subject: the journal was altered")
    who = rating[ratings.TENANT], rating[ratings.SUBJECT]
    if any(who != (each[ratings.TENANT], each[ratings.SUBJECT]) for each in (exchange, review or exchange)):
        raise Rejected(
            "foreign", "rating, review and answer do not belong to one subject: the journal was altered"
        )
    if review and review.get(ratings.VERDICT) == "dismissed":
        raise Rejected("dismissed", "an expert dismissed it")
    prompt, answer, correction = (
        exchange.get(FIELD + "prompt"),
        exchange.get(FIELD + "answer"),
        (review or rating).get(FIELD + "correction"),
    )
    if not isinstance(answer, str) or not isinstance(correction, str | None):
        raise Rejected("malformed", "its answer or its correction is not text: the journal was altered")
    if not isinstance(rating.get(FIELD + "stars"), int | None):
        raise Rejected("malformed", "its stars are not a number: the journal was altered")
    if exchange.get("event.action") == "POST /v1/completions":
        raise Rejected("no_chat", "the prompt was sent without the chat template that training uses")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(
        isinstance(each, dict) and each.keys() == {"role", "content"} and isinstance(each["content"], str)
        for each in prompt
    ):
        raise Rejected("no_plain_text", "the prompt contains tool calls, or parts that are not text")
    return Rated(
        transaction=rating[ratings.TRANSACTION],
        subject=who,
        time=rating[ratings.TIME],
        prompt=prompt,
        answer=answer,
        good=ratings.liked(rating),
        best=rating.get(FIELD + "thumb") == "up" or rating.get(FIELD + "stars") == 5,
        correction=correction,
    )


def assistant_turn(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def kto(rated: Rated) -> Example:
    if rated.good is None:
        raise Rejected("neutral", "three stars, or a correction alone, do not say whether the answer is good")
    return {"prompt": rated.prompt, "completion": assistant_turn(rated.answer), "label": rated.good}


def dpo(rated: Rated) -> Example:
    if rated.correction is None:
        raise Rejected("no_correction", "only a correction says what should have been answered")
    if rated.correction.strip() == rated.answer.strip():
        raise Rejected("same", "the correction is the answer")
    return {
        "prompt": rated.prompt,
        "chosen": assistant_turn(rated.correction),
        "rejected": assistant_turn(rated.answer),
    }


def sft(rated: Rated) -> Example:
    if rated.correction is not None:
        return {"messages": [*rated.prompt, *assistant_turn(rated.correction)]}
    if not rated.best:
        raise Rejected("not_best", "neither a thumb up, nor five stars, nor a correction")
    return {"messages": [*rated.prompt, *assistant_turn(rated.answer)]}


KINDS: dict[str, Callable[[Rated], Example]] = {"kto": kto, "dpo": dpo, "sft": sft}


def texts(value: object) -> Iterator[str]:
    """All strings of a JSON value except names and roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            if name != "role":
                yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def held_out(path: Path | None) -> Callable[[Example], bool]:
    """Whether an example contains RUN consecutive words, or a whole shorter text, from a file of JSON lines."""
    from llmtrain.data.words import runs_of, words_of

    runs_by_size: dict[int, set[int]] = {}
    try:
        # splitlines would split at U+2028 in a text.
        lines = list(StringIO(path.read_text(encoding="utf-8"))) if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise exits.Refusal(
            f"--held-out: {path} cannot be read as UTF-8 ({error}): specify a file of JSON lines"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            strings = list(texts(json.loads(line)))
        except ValueError:
            raise exits.Refusal(f"--held-out: line {number} of {path} is not JSON: {line[:60]!r}") from None
        for text in strings:
            words = words_of(text)
            if size := min(RUN, len(words)):
                runs_by_size.setdefault(size, set()).update(map(int, runs_of(words, size)))

    def shares(example: Example) -> bool:
        for text in texts(example):
            words = words_of(text)
            for size, runs in runs_by_size.items():
                # A short text has to be the whole one: three words in a row are everywhere.
                if (size == RUN or len(words) == size) and not runs.isdisjoint(
                    map(int, runs_of(words, size))
                ):
                    return True
        return False

    return shares


def timed(record: ratings.Record) -> bool:
    """Whether a record has a time, as each rating and review of a gateway has."""
    return isinstance(record.get(ratings.TIME), str)


def examples(
    folders: list[Path], kind: str, since: str, until: str, most: int, shares: Callable[[Example], bool]
) -> Iterator[tuple[str, Example | Rejected]]:
    """For each rating its transaction and the example, or why there is none: first those that experts reviewed, then the others,
    oldest first. A review counts from its own time on, if that is before `until`, and not for a later rating, which its expert
    never saw. KTO learns from the rating alone, so a review does not yield another example for it.
    """
    rated: dict[str, ratings.Record] = {}
    answers: dict[str, ratings.Record] = {}
    reviews: dict[str, ratings.Record] = {}
    for folder in folders:
        answers |= ratings.by_transaction(folder, ratings.ANSWERED)
        for transaction, rating in ratings.by_transaction(
            folder, ratings.RATED
        ).items():  # any gateway takes a rating
            previous = rated.get(transaction)
            if not timed(rating):
                continue
            if previous is None or previous[ratings.TIME] <= rating[ratings.TIME]:
                rated[transaction] = rating
        for path in ratings.files(folder, ratings.REVIEWED):
            reviews |= {
                each[ratings.TRANSACTION]: each
                for each in ratings.read(path)
                if each.keys() >= ratings.NAMES and timed(each) and each[ratings.TIME] < until
            }
    reviews = {
        transaction: review
        for transaction, review in reviews.items()
        if transaction in rated and review[ratings.TIME] >= rated[transaction][ratings.TIME]
    }
    of_subject: Counter[tuple[str, str]] = Counter()
    originals: dict[str, str] = {}

    def order(rating: ratings.Record) -> tuple[bool, str, str]:
        transaction = rating[ratings.TRANSACTION]
        return transaction not in reviews, rating[ratings.TIME], transaction

    for rating in sorted(rated.values(), key=order):
        transaction = rating[ratings.TRANSACTION]
        review = reviews.get(transaction)
        latest = review if review and kind != "kto" else rating
        if not since <= latest[ratings.TIME] < until:
            continue
        try:
            each = joined(rating, review, answers)
            example = KINDS[kind](each)
            if shares(example):
                raise Rejected("held_out", "it is in the held-out set, or contains a part of it")
            content = json.dumps(example, sort_keys=True)
            if content in originals:
                raise Rejected("duplicate", f"the same as {originals[content]}")
            if of_subject[each.subject] >= most:
                raise Rejected("cap", f"more than {most} from one subject")
        except Rejected as rejected:
            yield transaction, rejected
            continue
        originals[content] = transaction
        of_subject[each.subject] += 1
        yield transaction, example


def export(arguments: argparse.Namespace) -> int:
    """Write examples, rejects and a report to a new folder, and print the report."""
    # What root alone can change, root reads: the held-out set, of which jobs know nothing.
    become_owner(*filter(None, [arguments.held_out]))
    shares = held_out(arguments.held_out)
    become_owner(*arguments.journal, arguments.out)
    for folder in arguments.journal:
        if not folder.is_dir():
            raise exits.Refusal(
                f"--journal is {folder}, which is not a folder: specify a copy of /var/lib/llm-feedback"
            )
    until = arguments.until or datetime.now(UTC).isoformat()
    if arguments.out.exists():
        raise exits.Refusal(f"--out is {arguments.out}, which exists: specify a new folder")
    records, rejects = [], []
    span = arguments.since, until
    for transaction, each in examples(
        arguments.journal, arguments.kind, *span, arguments.per_subject, shares
    ):
        if isinstance(each, Rejected):
            rejects.append({"id": transaction, "rule": each.rule, "reason": each.reason})
        else:
            records.append({"id": transaction, **each})
    if not records:
        counts = dict(Counter(each["rule"] for each in rejects))
        raise exits.Refusal(
            f"no rating since {arguments.since} yields an example for {arguments.kind}: {counts or 'there are none'}"
        )
    write_export(arguments.out, arguments.kind, records, rejects, {"since": arguments.since, "until": until})
    return exits.DONE


def lines_of(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON lines, with sorted keys."""
    return "".join(json.dumps(each, ensure_ascii=False, sort_keys=True) + "\n" for each in rows)


def write_export(
    out: Path,
    kind: str,
    records: list[Example],
    rejects: list[dict[str, Any]],
    details: dict[str, Any],
    **more: list[dict[str, Any]],
) -> None:
    """Write examples, rejects, `more` lists by name, and a report to a new folder, and print the report."""
    data = lines_of(records)
    report = {
        "kind": kind,
        **details,
        "examples": len(records),
        "rejected": dict(sorted(Counter(each["rule"] for each in rejects).items())),
        "sha256": hashlib.sha256(data.encode()).hexdigest(),
    }
    files = {
        f"{kind}.jsonl": data,
        "rejects.jsonl": "".join(json.dumps(each) + "\n" for each in rejects),
        **{f"{name}.jsonl": lines_of(rows) for name, rows in more.items()},
        "export.json": json.dumps(report, indent=1) + "\n",
    }
    # Aside, so that after a kill the same command does it.
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True, mode=0o700)
    for name, text in files.items():
        (aside / name).write_text(text, encoding="utf-8")
        flush(aside / name)
    flush(aside)
    aside.rename(out)
    flush(out.parent)
    print(files["export.json"], end="")


def read_export(folder: Path) -> tuple[str, list[Example], str]:
    """The kind, examples and digest of an export; raises Refusal if it is altered or incomplete."""
    try:
        report = json.loads((folder / "export.json").read_text())
        if (kind := report["kind"]) not in KINDS:
            raise ValueError(f"its kind is {kind!r}")
        data = (folder / f"{kind}.jsonl").read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise exits.Refusal(
            f"--examples is {folder}, which does not contain a complete export ({error}): write it with `llm-train feedback "
            f"export`"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != report["sha256"]:
        raise exits.Refusal(
            f"{folder}/{kind}.jsonl has sha256 {digest}, but export.json says {report['sha256']}: export it again",
            exits.ALTERED,
        )
    return kind, [json.loads(line) for line in data.splitlines()], digest
