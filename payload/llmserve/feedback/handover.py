"""Hands over ratings that arrived at another host than the answer's: they go to the journal of the host that answered, through
the Redis that both share.

The host that accepted such a rating keeps it on disk, as `outgoing`, until the other host confirms that it is in its journal. So
the loss of a host or of Redis loses no rating, and a rating that arrives twice is stored once. A host writes one key for each
other host, which only that host may read: the oldest ratings for it, and the verdicts on that host's ratings. The key is sealed,
since corrections are text. One gateway of each host does this.
"""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llmcore.ratings import (
    ANSWERER,
    DELIVERED,
    FIELD,
    OUTGOING,
    RATED,
    RESPONSE_ID,
    SUBJECT,
    TENANT,
    TIME,
    TRANSACTION,
    Record,
    files,
    read,
)
from llmserve.access.estate_keys import Ring, derived
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError
from llmserve.feedback import index
from llmserve.feedback.journal import Journal, line, move
from llmserve.feedback.ratings import Reason
from llmserve.feedback.response_ids import AHEAD_SECONDS, ResponseIds
from llmserve.redis_client import Command, RedisClient, RedisUnavailable

log = logging.getLogger("llmserve.feedback.handover")
LOOK_SECONDS = 2.0
REST = 10  # times as long as a look takes, at least, passes before the next one: after days away there is much to read
LIFE_SECONDS = 60  # of what lies in Redis
BATCH_BYTES = 1 << 17  # of ratings for one host at a time
LETTER_BYTES = 1 << 19  # of another host's key, more of which is not read
DEADLINE_MS = 2000  # of Redis, for some 100 kB of each host; none of a client waits for it
NONCE = 12
LOCK = "handover.lock"
Verdict = Literal["taken", "refused"]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
# As `ratings.now` writes it: readers compare times as texts.
Moment = Annotated[str, StringConstraints(pattern=r"^[0-9-]{10}T[0-9:]{8}\.[0-9]{3}\+00:00$")]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(min_length=1, max_length=8000)]  # as it is without secrets


class Outgoing(BaseModel):
    """A rating as another host sends it: a journal record with the answer's id. Nothing else is accepted from a host."""

    model_config = ConfigDict(strict=True, extra="forbid")
    time: Moment = Field(alias=TIME)
    transaction: Name = Field(alias=TRANSACTION)
    created: Name = Field(alias="event.created")
    subject: Name = Field(alias=SUBJECT)
    tenant: Name = Field(alias=TENANT)
    thumb: Literal["up", "down"] | None = Field(default=None, alias=FIELD + "thumb")
    stars: Annotated[int, Field(ge=1, le=5)] | None = Field(default=None, alias=FIELD + "stars")
    reason: Reason | None = Field(default=None, alias=FIELD + "reason")
    corrected: Literal[True] | None = Field(default=None, alias=FIELD + "corrected")
    comment: Text | None = Field(default=None, alias=FIELD + "comment")
    correction: Text | None = Field(default=None, alias=FIELD + "correction")
    answerer: Name = Field(alias=ANSWERER)
    response_id: Name = Field(alias=RESPONSE_ID)


class Letter(BaseModel):
    """A letter from one host to another. `at`: seconds since the epoch. `verdicts`: on the other host's ratings, by digest."""

    model_config = ConfigDict(extra="forbid")
    at: float
    ratings: list[dict[str, object]] = []
    verdicts: dict[Digest, Verdict] = {}


def digest(record: Record) -> str:
    """The digest that identifies a rating between hosts."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def rating_of(outgoing: Record) -> Record:
    """The rating in the format of the journal of the host that answered."""
    return {name: value for name, value in outgoing.items() if name not in (ANSWERER, RESPONSE_ID)}


class Handover:
    """The handover of one host; of its gateway processes, the one that holds the lock does the work."""

    def __init__(
        self, ids: ResponseIds, journal: Journal, redis: RedisClient, keys: Ring, hold: Path | None
    ) -> None:
        """`redis`: a separate client, since one that waits for these keys would make requests wait. `hold`: a file that exists
        while nothing may be deleted.
        """
        self.ids, self.journal, self.redis, self.hold = ids, journal, redis, hold
        self.ciphers = [AESGCM(key) for key in derived(keys, "ratings between hosts")]
        self.unreadable: set[str] = set()  # hosts
        self.metrics = journal.metrics

    @property
    def folder(self) -> Path:
        return self.journal.folder

    async def watch(self) -> None:
        """Hand over once this process holds the lock; runs until cancelled, whatever fails."""
        descriptor = -1
        try:
            while (descriptor := self.locked()) < 0:
                await asyncio.sleep(LOOK_SECONDS)
            while True:
                begun = time.monotonic()
                try:
                    await self.look()
                except RedisUnavailable:
                    pass  # its client has said so, and what is outgoing stays
                except Exception as error:
                    # Of other errors the message may have a part of a record.
                    reason = str(error) if isinstance(error, OSError) else type(error).__name__
                    log.error("ratings are not handed over", extra={"fields": {"error.message": reason}})
                await asyncio.sleep(max(LOOK_SECONDS, REST * (time.monotonic() - begun)))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            await self.redis.close()

    def locked(self) -> int:
        """The lock's descriptor; -1 while another process has it, or the folder cannot be used."""
        try:
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return -1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return -1
        return descriptor

    async def look(self) -> None:
        """Accept what other hosts have for this one, settle what they accepted, and report both. Raises RedisUnavailable and
        OSError."""
        others = self.ids.others
        names = [self.redis.key(f"ratings:{self.ids.host}", other) for other in others]
        sealed = await self.redis.execute(*(("GETRANGE", name, 0, LETTER_BYTES - 1) for name in names))
        letters = {other: self.opened(other, each) for other, each in zip(others, sealed, strict=True)}
        receipts = {other: await self.take(letter.ratings) for other, letter in letters.items()}
        verdicts = {other: letter.verdicts for other, letter in letters.items()}
        await asyncio.to_thread(self.settle, verdicts)
        batches, waiting = await asyncio.to_thread(self.batches)
        self.metrics.ratings_outgoing.set(waiting)
        commands = []
        for other in others:
            letter = Letter(at=time.time(), ratings=batches.get(other, []), verdicts=receipts[other])
            commands.append(self.letter_command(other, letter))
        await self.redis.execute(*commands)

    def letter_command(self, other: str, letter: Letter) -> Command:
        """The command that leaves a letter for another host; None without ratings and verdicts."""
        key = self.redis.key(f"ratings:{other}")
        if not letter.ratings and not letter.verdicts:
            return "DEL", key
        nonce = os.urandom(NONCE)
        text = letter.model_dump_json().encode()
        sealed = self.ciphers[0].encrypt(nonce, text, address(self.ids.host, other))
        return "SET", key, nonce + sealed, "EX", LIFE_SECONDS

    def opened(self, other: str, sealed: bytes) -> Letter:
        """The letter of another host; empty unless it is sealed with the estate's key, for this host, and current."""
        for cipher in self.ciphers if sealed else ():
            try:
                text = cipher.decrypt(sealed[:NONCE], sealed[NONCE:], address(other, self.ids.host))
                letter = Letter.model_validate_json(text)
            except (InvalidTag, ValueError):
                continue
            if abs(time.time() - letter.at) <= LIFE_SECONDS + AHEAD_SECONDS:
                self.unreadable.discard(other)
                return letter
        if sealed and other not in self.unreadable:
            self.unreadable.add(other)
            log.warning("a host's ratings cannot be read", extra={"fields": {"host.name": other}})
        return Letter(at=0)

    async def take(self, records: list[Record]) -> dict[str, Verdict]:
        """Write the ratings that another host has for this one to the journal, durably; returns the verdicts by digest. A rating
        without a verdict comes again.
        """
        by_digest = {digest(record): record for record in records}
        verdicts = await asyncio.to_thread(self.judge, by_digest) if by_digest else {}
        fresh = [name for name in by_digest if name not in verdicts]
        errors = await asyncio.gather(
            *(self.journal.rate(rating_of(by_digest[name])) for name in fresh), return_exceptions=True
        )
        for name, error in zip(fresh, errors, strict=True):
            if error is None:
                verdicts[name] = "taken"
            elif isinstance(error, ApiError) and error.status == 429:
                verdicts[name] = "refused"  # it stays where it is
        return verdicts

    def judge(self, records: dict[str, Record]) -> dict[str, Verdict]:
        """In a thread: verdicts on ratings that the journal has, and on those that do not belong there. Once a subject is
        forgotten here, there is no answer to it, so ratings sent before do not return. Raises OSError.
        """
        verdicts: dict[str, Verdict] = {}
        with index.opened(self.folder) as database:
            # Of all hours: an answer that was forgotten must not be there.
            index.update(database, self.folder)
            for name, record in records.items():
                if not self.ours(record):
                    verdicts[name] = "refused"
                    continue
                rating = json.loads(line(rating_of(record)))
                transaction, time = rating[TRANSACTION], rating[TIME]
                places = index.ratings(database, self.folder, transaction)
                whose = index.holder(rating[SUBJECT], rating[TENANT])
                if any(place.time == time and index.record_at(place) == rating for place in places):
                    verdicts[name] = "taken"
                # Of a later one readers would take this one for the last.
                elif any(place.time > time for place in places) or not index.answered(
                    database, transaction, whose
                ):
                    verdicts[name] = "refused"
        return verdicts

    def ours(self, record: Record) -> bool:
        """Whether this is a rating by the subject to whom this host gave the id, and not from the future."""
        try:
            rating = Outgoing.model_validate(record)
            moment = datetime.fromisoformat(rating.time).timestamp()
            answered = self.ids.opened(
                rating.response_id, Identity("api_key", "", rating.subject, rating.tenant, ())
            )
        except (ValueError, ApiError):
            return False
        created = datetime.fromtimestamp(answered.issued, UTC).isoformat()
        ours = (answered.host, answered.transaction, created)
        return (
            ours == (self.ids.host, rating.transaction, rating.created)
            and moment <= time.time() + AHEAD_SECONDS
        )

    def settle(self, verdicts: dict[str, dict[Digest, Verdict]]) -> None:
        """In a thread: ratings that their host accepted leave this journal; refused ones, and those for a host that left the
        estate, stay as this host's own. Raises OSError.
        """
        legal_hold = self.hold is not None and self.hold.exists()

        def to(record: Record) -> tuple[str, Record] | None:
            answerer = str(record.get(ANSWERER))
            verdict = verdicts[answerer].get(digest(record)) if answerer in verdicts else "refused"
            if verdict is None:
                return None
            kind = RATED if verdict == "refused" else DELIVERED if legal_hold else ""
            return kind, rating_of(record)

        for path in files(self.folder, OUTGOING):
            for verdict in move(self.folder, path, to):
                self.metrics.ratings_handed_over.labels("refused" if verdict == RATED else "taken").inc()

    def batches(self) -> tuple[dict[str, list[Record]], int]:
        """In a thread: the oldest outgoing ratings for each host, and the total number."""
        batches: dict[str, list[Record]] = {}
        room = dict.fromkeys(self.ids.others, BATCH_BYTES)
        waiting = 0
        for record in outgoing(self.folder):
            waiting += 1
            answerer = str(record.get(ANSWERER))
            if room.get(answerer, 0) > 0:
                room[answerer] -= len(json.dumps(record))
                batches.setdefault(answerer, []).append(record)
        return batches, waiting


def outgoing(folder: Path) -> Iterator[Record]:
    """The outgoing ratings, oldest first."""
    return (record for path in files(folder, OUTGOING) for record in read(path))


def address(sender: str, receiver: str) -> bytes:
    """The context to which a letter is bound; host names contain no spaces."""
    return f"{sender} {receiver}".encode()
