"""The journal of ratings, of reviews, of assignments to arms and of how those ended, as gateways write it and training reads it:
JSON lines in files of an hour each, `KIND-HOUR.jsonl`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RATED, REVIEWED, ANSWERED, ASSIGNED, ENDED = "rated", "reviewed", "answered", "assigned", "ended"  # kinds
FORGOTTEN = (
    "forgotten"  # a kind: transactions of ratings that a subject deleted, which exports may still have
)
OUTGOING = "outgoing"  # a kind: ratings of another host's answers, until its journal has them
DELIVERED = "delivered"  # a kind: those that it has, which a legal hold keeps here, too
TRANSACTION, SUBJECT, TENANT, TIME = "transaction.id", "user.id", "organization.id", "@timestamp"
NAMES = {TRANSACTION, SUBJECT, TENANT}
FIELD, ARM_FIELD = "llmkeep.feedback.", "llmkeep.experiment."
# Of a review, whose subject and tenant are those of the answer. The verdict is `corrected` or `dismissed`.
VERDICT, REVIEWER, REVIEWER_TENANT = FIELD + "verdict", FIELD + "reviewer", FIELD + "reviewer_tenant"
# Of what is forgotten: fields of their own, so that it is no record that the subject sees or deletes.
DELETER, DELETER_TENANT = FIELD + "deleter", FIELD + "deleter_tenant"
# Of an outgoing rating: the host that answered, and the answer's id.
ANSWERER, RESPONSE_ID = FIELD + "answerer", FIELD + "response_id"
GOOD, BAD = 4, 2  # stars, and beyond


def files(folder: Path, kind: str = "*") -> list[Path]:
    """The journal's files, oldest first."""
    return sorted(folder.glob(f"{kind}-*.jsonl"), key=lambda path: (path.stem.partition("-")[2], path.name))


def read(path: Path, named: bytes = b"") -> Iterator[Record]:
    """The records of a file; lines that a power cut has torn are passed over. One that was removed meanwhile has none.

    `named`: JSON that a line must have to be parsed.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if named not in line:
                continue
            if record := parsed(line):
                yield record


def parsed(line: bytes) -> Record | None:
    """A line's record. None where a power cut has torn it, or where no gateway wrote it: one of its NAMES is no text."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(record, dict) and all(isinstance(record.get(name, ""), str) for name in NAMES)
    return record if ours else None


def by_transaction(folder: Path, kind: str) -> dict[str, Record]:
    """The last record of each exchange, which has one subject."""
    return {
        record[TRANSACTION]: record
        for path in files(folder, kind)
        for record in read(path)
        if TRANSACTION in record
    }


def liked(rating: Record) -> bool | None:
    """What a rating says: thumbs, or stars but the middle one."""
    if (thumb := rating.get(FIELD + "thumb")) is not None:
        return bool(thumb == "up")
    stars = rating.get(FIELD + "stars")
    return None if stars is None or BAD < stars < GOOD else bool(stars >= GOOD)
