"""Subjects' access to their own records in this host's journal: `GET` and `DELETE /v1/feedback`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

from llmcore.ratings import ANSWERED, FIELD, SUBJECT, TENANT, TIME, Record
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError, unavailable
from llmserve.api.response_models import Shape
from llmserve.asgi import Exchange
from llmserve.feedback import index, journal

MOST = 50  # of a list: an exchange may have 50,000 characters
# Not the model that answered: it could tell the arm of an experiment.
SHOWN = ("thumb", "stars", "reason", "corrected", "comment", "correction", "prompt", "answer")


class KeptRecord(Shape):
    """A rating, or an exchange whose text is kept. `time`: time of the record, ISO 8601."""

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
    """Response of GET /v1/feedback, newest first. `left_out`: the number of older ones, which `before` set to `next` shows.
    `others`: records of experiments and reviews, which are not shown. `text_kept`: whether the tenant's policy keeps text.
    """

    object: Literal["list"] = "list"
    data: list[KeptRecord]
    left_out: int
    next: str | None = None
    others: int
    text_kept: bool


class Forgotten(Shape):
    """Response of DELETE /v1/feedback. `left`: records that were added meanwhile."""

    object: Literal["feedback.forgotten"] = "feedback.forgotten"
    removed: int
    left: int


def is_of(record: Record, identity: Identity) -> bool:
    return (record.get(SUBJECT), record.get(TENANT)) == (identity.subject, identity.tenant)


def listed(folder: Path, identity: Identity, before: str = "") -> tuple[list[tuple[str, Record]], int, int]:
    """The newest ratings and exchanges of a subject that are older than `before`, newest first; the number of even older ones,
    and of its other records. Raises OSError.
    """
    who = identity.subject, identity.tenant
    with index.opened(folder) as database:
        index.update(database, folder)
        places = index.of(database, folder, *who, before, MOST)
        count, others = index.counted(database, *who, before)
    records = [(place.kind, index.record_at(place)) for place in places]
    newest = [(kind, record) for kind, record in records if record and is_of(record, identity)]
    return newest, count - len(places), others


def forget(folder: Path, identity: Identity) -> Forgotten:
    """Remove all records of a subject from the files that have any; raises OSError."""
    who = identity.subject, identity.tenant
    with index.opened(folder) as database:
        index.update(database, folder)
        concerned = index.concerned(database, folder, *who)
        journal.note_ids(concerned, folder, *who)
        removed = journal.forget(folder, lambda each: is_of(each, identity), name_of(identity), concerned)
        index.update(database, folder)
        return Forgotten(removed=removed, left=sum(index.counted(database, *who)))


def name_of(identity: Identity) -> bytes:
    """The subject in the form in which each of its lines contains it."""
    return to_json(identity.subject)


class OwnRecords:
    """The records of one gateway process, which reads and rewrites for one subject at a time."""

    def __init__(self, folder: Path | None, hold: Path | None) -> None:
        """`folder`: of the journal; without one nothing is kept. `hold`: a file that exists while nothing may be deleted."""
        self.folder = folder
        self.hold = hold
        self.lock = asyncio.Lock()
        self.asking: set[tuple[str, str]] = set()  # tenants and subjects

    @asynccontextmanager
    async def turn(self, identity: Identity) -> AsyncIterator[None]:
        """Admit one request at a time, and none from a subject that is already waiting: raises ApiError 429."""
        who = identity.tenant, identity.subject
        if who in self.asking:
            message = "your last request for your records has not been answered yet: wait for it"
            raise ApiError(429, "feedback_busy", message, headers=[(b"retry-after", b"1")])
        self.asking.add(who)
        try:
            async with self.lock:
                yield
        finally:
            self.asking.discard(who)

    async def list(self, exchange: Exchange, before: str) -> Kept:
        """Raises ApiError 429 or 503."""
        identity, decision, folder = exchange.identity, exchange.decision, self.folder
        if identity is None or decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        if folder is None:
            return Kept(data=[], left_out=0, others=0, text_kept=decision.keep_prompts)
        async with self.turn(identity):
            newest, left_out, others = await in_thread(lambda: listed(folder, identity, before))
        return Kept(
            data=[public_record(*each) for each in newest],
            left_out=left_out,
            next=str(newest[-1][1][TIME]) if newest and left_out else None,
            others=others,
            text_kept=decision.keep_prompts,
        )

    async def forget(self, exchange: Exchange) -> Forgotten:
        """Delete all records of the subject, but, unlike an operator's `forget`, no reviews by it: an expert must not delete
        reviews of others' answers. Raises ApiError 409 under a legal hold, 429 and 503.
        """
        identity, folder = exchange.identity, self.folder
        if identity is None:
            raise RuntimeError("this route must be behind authentication and policy")
        if self.hold and self.hold.exists():
            raise ApiError(
                409,
                "legal_hold",
                "nothing may be deleted here at present because of a legal hold: ask the operator",
            )
        if folder is None:
            return Forgotten(removed=0, left=0)
        async with self.turn(identity):
            return await in_thread(lambda: forget(folder, identity))


def public_record(kind: str, record: Record) -> KeptRecord:
    fields = {name: record[FIELD + name] for name in SHOWN if FIELD + name in record}
    return KeptRecord(
        object="exchange" if kind == ANSWERED else "rating", time=str(record.get(TIME)), **fields
    )


async def in_thread[T](work: Callable[[], T]) -> T:
    """Raises ApiError 503 if the disk fails."""
    try:
        return await asyncio.to_thread(work)
    except OSError:
        raise unavailable(
            "feedback_unavailable", "the journal cannot be read now: try again later", 5
        ) from None
