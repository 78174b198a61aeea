"""What subjects see and delete of what the journal of this host has of them: `GET` and `DELETE /v1/feedback`."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

from llmcore.ratings import ANSWERED, FIELD, RATED, SUBJECT, TENANT, TIME, Record, files, read
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError, unavailable
from llmserve.api.response_models import Shape
from llmserve.asgi import Exchange
from llmserve.feedback import journal

MOST = 200  # of a list, the newest
# Not the model that answered: it could tell the arm of an experiment.
SHOWN = ("thumb", "stars", "reason", "corrected", "comment", "correction", "prompt", "answer")


class KeptRecord(Shape):
    """A rating, or an exchange whose text is kept. `time`: of the record, ISO 8601."""

    object: Literal["rating", "exchange"]
    time: str
    thumb: str | None = None
    stars: int | None = None
    reason: str | None = None
    corrected: bool | None = None
    comment: str | None = None
    correction: str | None = None
    prompt: str | list[dict[str, Any]] | None = None
    answer: str | None = None


class Kept(Shape):
    """Response of GET /v1/feedback, the newest first. `left_out`: older ones. `others`: records of experiments and reviews, which
    are not shown. `text_kept`: what the tenant's policy decides.
    """

    object: Literal["list"] = "list"
    data: list[KeptRecord]
    left_out: int
    others: int
    text_kept: bool


class Forgotten(Shape):
    """Response of DELETE /v1/feedback. `left`: records that came meanwhile."""

    object: Literal["feedback.forgotten"] = "feedback.forgotten"
    removed: int
    left: int


def is_of(record: Record, identity: Identity) -> bool:
    return (record.get(SUBJECT), record.get(TENANT)) == (identity.subject, identity.tenant)


def records(folder: Path | None, identity: Identity) -> Iterator[tuple[str, Record]]:
    """Records of a subject with their kinds, oldest first, one at a time; only lines with its name are parsed. Raises OSError."""
    for path in files(folder) if folder else ():
        kind = path.stem.partition("-")[0]
        yield from ((kind, each) for each in read(path, name_of(identity)) if is_of(each, identity))


def name_of(identity: Identity) -> bytes:
    """The subject as it is in each of its lines."""
    return to_json(identity.subject)


def listed(folder: Path | None, identity: Identity) -> tuple[list[tuple[str, Record]], int, int]:
    """The newest ratings and exchanges of a subject, newest first; the numbers of older ones, and of other records of it.
    Raises OSError.
    """
    newest: deque[tuple[str, Record]] = deque(maxlen=MOST)
    count = others = 0
    for kind, record in records(folder, identity):
        if kind in {RATED, ANSWERED}:
            newest.append((kind, record))
            count += 1
        else:
            others += 1
    return list(reversed(newest)), count - len(newest), others


class OwnRecords:
    """Of one gateway process, which reads and rewrites for one subject at a time."""

    def __init__(self, folder: Path | None, hold: Path | None) -> None:
        """`folder`: of the journal; without one nothing is kept. `hold`: file that is there while nothing may be deleted."""
        self.folder = folder
        self.hold = hold
        self.turn = asyncio.Lock()

    async def list(self, exchange: Exchange) -> Kept:
        """Raises ApiError 503."""
        identity, decision = exchange.identity, exchange.decision
        if identity is None or decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        async with self.turn:
            newest, left_out, others = await in_thread(lambda: listed(self.folder, identity))
        return Kept(
            data=[shown(*each) for each in newest],
            left_out=left_out,
            others=others,
            text_kept=decision.keep_prompts,
        )

    async def forget(self, exchange: Exchange) -> Forgotten:
        """All records of the subject. Not reviews by it, as an operator's `forget`: an expert must not delete those of others'
        answers. Raises ApiError 409 under a legal hold, and 503.
        """
        identity = exchange.identity
        if identity is None:
            raise RuntimeError("this route must be behind authentication and policy")
        if self.hold and self.hold.exists():
            raise ApiError(
                409, "legal_hold", "nothing may be deleted here at present, by a legal hold: ask the operator"
            )
        folder = self.folder
        if folder is None:
            return Forgotten(removed=0, left=0)
        async with self.turn:
            await in_thread(lambda: journal.note_ids(folder, identity.subject, identity.tenant))
            removed = await in_thread(
                lambda: journal.forget(folder, lambda each: is_of(each, identity), name_of(identity))
            )
            left = await in_thread(lambda: sum(1 for _ in records(folder, identity)))
        return Forgotten(removed=removed, left=left)


def shown(kind: str, record: Record) -> KeptRecord:
    fields = {name: record[FIELD + name] for name in SHOWN if FIELD + name in record}
    return KeptRecord(object="rating" if kind == RATED else "exchange", time=str(record.get(TIME)), **fields)


async def in_thread[T](work: Callable[[], T]) -> T:
    """Raises ApiError 503 where the disk fails."""
    try:
        return await asyncio.to_thread(work)
    except OSError:
        raise unavailable(
            "feedback_unavailable", "the journal cannot be read now: try again later", 5
        ) from None
