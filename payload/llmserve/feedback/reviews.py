"""Reviews: experts' corrections of badly rated answers on this host, for tenants that consent.

Journals may be large, so reading is bounded: only the texts of the few answers that are shown are read.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcore.ratings import (
    ANSWERED,
    FIELD,
    RATED,
    REVIEWED,
    REVIEWER,
    REVIEWER_TENANT,
    SUBJECT,
    TENANT,
    TIME,
    TRANSACTION,
    VERDICT,
    Record,
    files,
    liked,
    parsed,
    read,
)
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError
from llmserve.feedback.journal import append, line
from llmserve.feedback.ratings import now

# What was wrong with an answer, in the words of those who look at many.
TAGS = (
    "factual", "fabricated", "reasoning", "outdated", "instructions", "incomplete", "unsafe", "over_refusal", "style", "language",
)  # fmt: skip
LONGEST = 20_000  # characters of a correction
# Of a line that a gateway wrote: in a text the quotes would be escaped, and nothing of a client stands before it.
ID = re.compile(rb'"transaction\.id": ?"([^"\\]+)"')


@dataclass(frozen=True, slots=True)
class Item:
    """A badly rated answer. `kept_in`: the file with its rating. `review`: the last one, if any, even if it is of an earlier
    rating.
    """

    rating: Record
    answer: Record
    review: Record | None
    kept_in: Path

    @property
    def transaction(self) -> str:
        return str(self.rating[TRANSACTION])

    @property
    def reviewed(self) -> bool:
        """Whether the review is of this rating, rather than of an earlier one."""
        return self.review is not None and self.review[TIME] >= self.rating[TIME]


@dataclass(frozen=True, slots=True)
class Rated:
    """The last rating of an exchange, a bad one: its time, the rater, and the file that contains it."""

    time: str
    who: tuple[str, str]
    path: Path


def badly_rated(folder: Path, tenants: Collection[str]) -> dict[str, Rated]:
    """Exchanges of these tenants by their transactions."""
    exchanges: dict[str, Rated] = {}
    for path in files(folder, RATED):
        for record in read(path):
            if record.get(TENANT) not in tenants:
                continue
            transaction = record[TRANSACTION]
            if liked(record) is False:
                exchanges[transaction] = Rated(record[TIME], (record[TENANT], record[SUBJECT]), path)
            else:  # the subject thinks better of it
                exchanges.pop(transaction, None)
    return exchanges


def places(folder: Path, transactions: Collection[str]) -> dict[str, tuple[Path, int]]:
    """The locations of the answers of these exchanges: a file, and the offset of a line."""
    locations: dict[str, tuple[Path, int]] = {}
    for path in files(folder, ANSWERED) if transactions else ():
        try:
            file = path.open("rb")
        except FileNotFoundError:  # forgotten meanwhile
            continue
        with file:
            offset = 0
            for each in file:
                match = ID.search(each)
                if match and (transaction := match[1].decode(errors="replace")) in transactions:
                    locations[transaction] = path, offset
                offset += len(each)
    return locations


def last_of(folder: Path, kind: str, transactions: Collection[str]) -> dict[str, Record]:
    """The last record of each of these exchanges."""
    records = (record for path in files(folder, kind) for record in read(path))
    return {record[TRANSACTION]: record for record in records if record.get(TRANSACTION) in transactions}


def line_at(path: Path, offset: int) -> Record:
    """The record of a line; {} if `forget` has changed the file meanwhile."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return parsed(file.readline()) or {}
    except FileNotFoundError:
        return {}


def items(
    folder: Path, exchanges: dict[str, Rated], where: dict[str, tuple[Path, int]], transactions: Iterable[str]
) -> Iterator[Item]:
    """The requested answers whose rating and answer belong to one subject, and still exist."""
    transactions = list(transactions)
    ratings, reviews = (last_of(folder, kind, transactions) for kind in (RATED, REVIEWED))
    for transaction in transactions:
        rating, answer = ratings.get(transaction, {}), line_at(*where[transaction])
        who = exchanges[transaction].who
        ours = all(
            (each.get(TRANSACTION), each.get(TENANT), each.get(SUBJECT)) == (transaction, *who)
            for each in (rating, answer)
        )
        if ours and liked(rating) is False:
            yield Item(rating, answer, reviews.get(transaction), exchanges[transaction].path)


def queue(folder: Path, tenants: Collection[str], most: int) -> tuple[list[Item], int, int]:
    """The oldest answers of these tenants that wait for a review, at most `most`; how many are waiting in total; and how many
    badly rated answers are not here, because their text was not kept or another host has them.
    """
    exchanges = badly_rated(folder, tenants)
    for path in files(folder, REVIEWED):
        for record in read(path):
            rated = exchanges.get(record.get(TRANSACTION, ""))
            if rated and record[TIME] >= rated.time:  # of a later rating the expert knew nothing
                del exchanges[record[TRANSACTION]]
    where = places(folder, exchanges)
    waiting = sorted(where, key=lambda transaction: (exchanges[transaction].time, transaction))
    return list(items(folder, exchanges, where, waiting[:most])), len(waiting), len(exchanges) - len(where)


def item(folder: Path, tenants: Collection[str], transaction: str) -> Item | None:
    """A badly rated answer of these tenants, reviewed or not; None if it does not exist or belongs to another tenant."""
    exchanges = badly_rated(folder, tenants)
    if transaction not in exchanges:
        return None
    where = places(folder, [transaction])
    return next(items(folder, exchanges, where, where), None)


def written(item: Item, reviewer: Identity, correction: str, tags: Collection[str]) -> Record:
    """A review in the journal's format; without a correction it dismisses the rating. Raises ApiError 400.

    Subject and tenant are those of the answer, so that forgetting them removes the review as well.
    """
    if len(correction) > LONGEST:
        raise ApiError(
            400,
            "correction_too_long",
            f"the correction has {len(correction)} characters: write {LONGEST} or fewer",
        )
    if unknown := [tag for tag in tags if tag not in TAGS]:
        raise ApiError(400, "unknown_tag", f"{unknown[0][:40]!r} is not a tag: choose from {', '.join(TAGS)}")
    record: Record = {
        TIME: now(),
        TRANSACTION: item.transaction,
        SUBJECT: item.rating[SUBJECT],
        TENANT: item.rating[TENANT],
        REVIEWER: reviewer.subject,
        REVIEWER_TENANT: reviewer.tenant,
        VERDICT: "corrected" if correction else "dismissed",
        FIELD + "tags": [tag for tag in TAGS if tag in tags],
    }
    return record | {FIELD + "correction": correction} if correction else record


def keep(folder: Path, item: Item, review: Record) -> bool:
    """Append a review unless the rating has the same one already; returns False if the answer was forgotten. Raises OSError."""

    def still() -> bool:
        return any(record.get(TRANSACTION) == item.transaction for record in read(item.kept_in))

    same = json.loads(line(review)) | {TIME: ""}
    if item.review and item.reviewed and item.review | {TIME: ""} == same:
        return still()
    return append(folder, [(REVIEWED, review)], still)
