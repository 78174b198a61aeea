"""Stores ratings, reviews, the exchanges that may be rated, and assignments to arms, as JSON lines in one file per hour, on a
persistent volume.

All gateways of a host write into one folder. Each batch reopens its file under a lock that `forget` takes as well, so that files
can be rewritten while gateways run.
"""

import asyncio
import fcntl
import json
import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic_core import to_json

from llmcore.files import flush, replacing, size, write_aside
from llmcore.ratings import (
    ANSWERED,
    ASSIGNED,
    DELETER,
    DELETER_TENANT,
    ENDED,
    FIELD,
    FORGOTTEN,
    OUTGOING,
    RATED,
    SUBJECT,
    TENANT,
    TRANSACTION,
    Record,
    files,
    parsed,
    read,
)
from llmserve.api.errors import ApiError, unavailable
from llmserve.audit.redact import scrubbed
from llmserve.feedback import index
from llmserve.feedback.documents import mark
from llmserve.metrics import Metrics

log = logging.getLogger("llmserve.feedback")
TEXTS = tuple(f"{FIELD}{name}" for name in ("comment", "correction", "prompt", "answer"))
RATINGS = RATED, OUTGOING  # kinds
MOST_WAITING = 1024  # records that wait for the disk; one more answer is not kept, one more rating refused
ANSWER_BYTES = 1 << 30  # with more of one kind in the journal no further one is kept; ratings are
RATINGS_OF_ONE = 20  # of an answer: the last one counts
RATING_BYTES = 1 << 26  # of a subject
RESERVE_BYTES = (
    1 << 26
)  # of the volume, besides the room in which the largest file is rewritten, so that what is kept can be deleted
LOOK_SECONDS = 60.0
HOUR = "%Y%m%dT%H"
DAY = 86_400
# A folder in the journal's, where ratings go to Elasticsearch: how far each file was sent, and what is to be deleted there.
SHIPPING, POSITIONS, UNINDEXED = "shipping", "positions.json", "unindexed.jsonl"
REWRITTEN = "rewritten"  # touched whenever lines were taken out of a file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The lock is the folder itself, so that no file is needed for it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def line(record: Record) -> bytes:
    """A record as a line, its texts without secrets and personal identifiers."""
    texts = {name: scrubbed(record[name]) for name in TEXTS if name in record}
    return to_json(record | texts) + b"\n"


def append(
    folder: Path, records: Iterable[tuple[str, Record]], still: Callable[[], bool] = lambda: True
) -> bool:
    """Append records, each with its kind, and return once they are on disk; raises OSError.

    Returns False, with nothing written, if `still` is false under the folder's lock: the exchanges have been forgotten.
    """
    hour = time.strftime(HOUR, time.gmtime())
    texts: dict[Path, list[bytes]] = {}
    for kind, record in records:
        texts.setdefault(folder / f"{kind}-{hour}.jsonl", []).append(line(record))
    with locked(folder):
        if not still():
            return False
        for path, lines in texts.items():
            append_lines(path, lines)
    return True


def append_lines(path: Path, lines: list[bytes]) -> None:
    """Append lines durably; call it with the folder's lock held."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        ended = [b"\n"] if torn(file.fileno()) else []  # by a power cut, or by a disk that was full
        data = b"".join(ended + lines)
        while data:
            data = data[os.write(file.fileno(), data) :]
        os.fsync(file.fileno())
    if is_new:
        flush(path.parent)


def torn(descriptor: int) -> bool:
    """Whether the file ends within a line."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def positions(folder: Path) -> dict[str, int]:
    """The number of bytes of each file that Elasticsearch has. If the note is missing or broken, everything is sent again."""
    try:
        offsets = json.loads((folder / SHIPPING / POSITIONS).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return offsets if isinstance(offsets, dict) else {}


def put_positions(folder: Path, offsets: dict[str, int]) -> None:
    """Note them durably, without those of files that are gone; the folder's lock is held."""
    existing = {name: size for name, size in offsets.items() if (folder / name).exists()}
    write_aside(folder / SHIPPING / POSITIONS, json.dumps(existing))


def unindex(folder: Path, path: Path, records: Iterable[Record]) -> None:
    """Before records leave a file: note what is to be deleted from the index; call it with the folder's lock held.

    The file loses its position first, so that a rewritten file is sent again from its start.
    """
    if not path.name.startswith(f"{RATED}-") or not (folder / SHIPPING).is_dir():
        return
    put_positions(folder, {name: size for name, size in positions(folder).items() if name != path.name})
    lines = []
    for record in records:
        with suppress(KeyError, TypeError, ValueError):  # no rating, so it was never sent
            lines.append(to_json(mark(record)) + b"\n")
    if lines:
        append_lines(folder / SHIPPING / UNINDEXED, lines)


def clean_up(folder: Path) -> None:
    """Remove files that a killed `forget` left half-written."""
    with locked(folder):
        for path in folder.glob("*.partial"):
            path.unlink()


def note_ids(paths: list[Path], folder: Path, subject: str, tenant: str) -> None:
    """Before a subject deletes its records from these files: note which exchanges it rated, for `forget --ids`; raises OSError.

    Only what was rated can be in an export.
    """
    for path in (each for each in paths if each.name.startswith(f"{RATED}-")):
        ids = {
            record[TRANSACTION]: None
            for record in read(path, to_json(subject))
            if (record.get(SUBJECT), record.get(TENANT)) == (subject, tenant)
        }
        notes = ({TRANSACTION: each, DELETER: subject, DELETER_TENANT: tenant} for each in ids)
        if ids:
            append(folder, ((FORGOTTEN, note) for note in notes))


def forget(
    folder: Path, of: Callable[[Record], bool], substring: bytes = b"", paths: list[Path] | None = None
) -> int:
    """Remove all records for which `of` is true, and return their number once that is on disk.

    `substring`: JSON that each of their lines has, so that others need not be parsed. `paths`: the files that may have some.
    """

    def theirs(line: bytes) -> bool | None:
        """None for a torn line, which may belong to anyone, and is removed as well."""
        if substring not in line and line.endswith(b"}\n"):
            return False
        return of(record) if (record := parsed(line)) else None

    removed = 0
    clean_up(folder)
    for path in files(folder) if paths is None else paths:
        with suppress(FileNotFoundError):  # another one was faster
            if untouched(path, theirs):
                continue
            with locked(folder):  # for each file, so that ratings do not wait for all of them
                removed += rewrite(folder, path, theirs, (each for each in read(path, substring) if of(each)))
    return removed


def untouched(path: Path, theirs: Callable[[bytes], bool | None]) -> bool:
    """Whether all lines stay, checked without the lock. Raises FileNotFoundError."""
    with path.open("rb") as file:
        return all(theirs(each) is False for each in file)


def rewrite(
    folder: Path, path: Path, theirs: Callable[[bytes], bool | None], records: Iterable[Record]
) -> int:
    """Remove lines from a file, and return the number of records among them; call it with the folder's lock held.

    It works line by line, since a file can be larger than a gateway's memory. Raises FileNotFoundError.
    """
    removed = 0
    with path.open("rb") as before, replacing(path) as aside:
        aside.touch(0o600)
        with aside.open("wb") as after:
            for each in before:
                if (verdict := theirs(each)) is False:
                    after.write(each)
                removed += verdict is True
        unindex(folder, path, records)
    if not path.name.startswith(f"{OUTGOING}-"):  # which no one counts
        (folder / REWRITTEN).touch(0o600)
    if not path.stat().st_size:
        path.unlink()
        flush(folder)
    return removed


def move(folder: Path, path: Path, to: Callable[[Record], tuple[str, Record] | None]) -> list[str]:
    """Move outgoing ratings to other files or out of the journal: for each, `to` returns its new kind and record, "" to remove
    it, and None to keep it. A crash in between leaves it in both places. Returns the kinds; raises OSError.
    """
    hour = time.strftime(HOUR, time.gmtime())
    with locked(folder):
        moves = [move for record in read(path) if (move := to(record))]
        for kind in sorted({kind for kind, _ in moves if kind}):
            lines = [line(record) for each, record in moves if each == kind]
            append_lines(folder / f"{kind}-{hour}.jsonl", lines)
        if moves:
            with suppress(FileNotFoundError):
                rewrite(folder, path, lambda each: (record := parsed(each)) is None or bool(to(record)), ())
    return [kind for kind, _ in moves]


def expire(folder: Path, days: int) -> int:
    """Remove files whose hour began more than `days` days ago, and return the number of their records."""
    removed = 0
    clean_up(folder)
    oldest = time.strftime(HOUR, time.gmtime(time.time() - days * DAY))
    for path in files(folder):
        with locked(folder):
            if path.stem.partition("-")[2] < oldest and path.exists():
                removed += sum(1 for _ in read(path))
                unindex(folder, path, read(path))
                path.unlink()
                flush(folder)
    return removed


def kept_bytes(folder: Path, kind: str) -> int:
    """Size of all records of a kind in the journal."""
    return sum(map(size, files(folder, kind)))


class Journal:
    """The journal of one gateway process. Records that arrive while the disk is busy share the next flush."""

    def __init__(self, folder: Path, metrics: Metrics, answer_bytes: int = ANSWER_BYTES) -> None:
        """`answer_bytes`: beyond this many bytes of answers in the journal, no more are kept; likewise for assignments and their
        outcomes."""
        self.folder = folder
        self.metrics = metrics
        self.answer_bytes = answer_bytes
        self.rating_bytes = RATING_BYTES
        self.reserve = RESERVE_BYTES
        self.largest = 0  # bytes of a file
        self.open_index: sqlite3.Connection | None = None
        self.indexed = (
            ""  # the hour in which all files were compared with the index, as another program may remove some
        )
        self.looked = -LOOK_SECONDS  # time.monotonic() of the last look at the size
        self.full: set[str] = set()  # kinds
        self.waiting: list[tuple[str, Record, asyncio.Future[None] | None]] = []
        self.task: asyncio.Task[None] | None = None

    async def rate(self, record: Record, kind: str = RATED) -> None:
        """Keep a rating; returns once it is on disk, else raises ApiError 429 or 503."""
        if len(self.waiting) >= MOST_WAITING:
            raise not_kept()
        future = asyncio.get_running_loop().create_future()
        self.put(kind, record, future)
        await future

    def answered(self, record: Record) -> None:
        """Keep an exchange with the next flush. If that fails, it cannot be used for training; nothing else is lost."""
        self.note(ANSWERED, record)

    def assigned(self, record: Record) -> None:
        """Keep an assignment to an arm, in the same way. If that fails, its rating does not count as an outcome."""
        self.note(ASSIGNED, record)

    def ended(self, record: Record) -> None:
        """Keep the end of an assigned exchange, in the same way. If that fails, no guardrail sees it."""
        self.note(ENDED, record)

    def note(self, kind: str, record: Record) -> None:
        if kind in self.full or len(self.waiting) >= MOST_WAITING:
            self.metrics.answers_not_kept.inc()
        else:
            self.put(kind, record, None)

    def put(self, kind: str, record: Record, future: asyncio.Future[None] | None) -> None:
        self.waiting.append((kind, record, future))
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self.write())

    def keep(self, records: list[tuple[str, Record]]) -> list[ApiError | None]:
        """In a thread: write what is within bounds, and check the sizes from time to time. Returns why each was not written;
        raises OSError.
        """
        if no_room := self.no_room():
            return [no_room] * len(records)
        refusals = self.refusals([record for kind, record in records if kind in RATINGS])
        verdicts = [next(refusals) if kind in RATINGS else None for kind, _ in records]
        append(
            self.folder, [each for each, verdict in zip(records, verdicts, strict=True) if verdict is None]
        )
        if time.monotonic() >= self.looked + LOOK_SECONDS:
            self.looked = time.monotonic()
            kinds = ANSWERED, ASSIGNED, ENDED
            with suppress(OSError):  # what was written is written
                self.full = {kind for kind in kinds if kept_bytes(self.folder, kind) > self.answer_bytes}
                self.largest = max(map(size, files(self.folder)), default=0)
        return verdicts

    def no_room(self) -> ApiError | None:
        """Refused if the volume has no space beyond what deleting needs, which writes a new copy of a file."""
        volume = os.statvfs(self.folder)
        free = volume.f_bavail * volume.f_frsize
        if free >= self.largest + self.reserve:
            return None
        log.error("the journal's volume is full", extra={"fields": {"free_bytes": free}})
        return not_kept()

    def refusals(self, ratings: list[Record]) -> Iterator[ApiError | None]:
        """Why each rating is not kept, in order; each one counts the earlier ones of its batch."""
        if not ratings:
            return
        counts, sizes = Counter[object](), Counter[bytes]()
        with index.opened(self.folder) as database:
            # The last connection that closes writes the whole log back; this one stays, so that no rating pays for it.
            self.open_index = self.open_index or index.connected(self.folder)
            hour, previous = (time.strftime(HOUR, time.gmtime(time.time() - ago)) for ago in (0, 3600))
            index.update(database, self.folder, previous if self.indexed == hour else "")
            self.indexed = hour
            for rating in ratings:
                transaction, whose = (
                    rating[TRANSACTION],
                    index.holder(rating.get(SUBJECT), rating.get(TENANT)),
                )
                if index.rated(database, transaction, RATINGS_OF_ONE) + counts[transaction] >= RATINGS_OF_ONE:
                    yield too_many(
                        f"this answer was rated {RATINGS_OF_ONE} times, and the last rating counts"
                    )
                elif index.rated_bytes(database, whose) + sizes[whose] >= self.rating_bytes:
                    yield too_many(
                        f"your ratings take {self.rating_bytes} bytes here, which is the limit: delete them with DELETE "
                        f"/v1/feedback"
                    )
                else:
                    counts[transaction] += 1
                    sizes[whose] += len(line(rating))
                    yield None

    async def write(self) -> None:
        """Write until nothing is waiting. Whatever fails, no client waits forever."""
        while self.waiting:
            batch, self.waiting = self.waiting, []
            try:
                errors = await asyncio.to_thread(self.keep, [each[:2] for each in batch])
            except Exception as failure:
                # Of other errors the message may have a part of the record.
                reason = str(failure) if isinstance(failure, OSError) else type(failure).__name__
                log.error("feedback cannot be kept", extra={"fields": {"error.message": reason}})
                errors = [not_kept()] * len(batch)
            for (_, _, future), error in zip(batch, errors, strict=True):
                if future is None:
                    self.metrics.answers_not_kept.inc(error is not None)
                elif not future.done():  # its client may have left
                    future.set_result(None) if error is None else future.set_exception(error)

    async def settled(self) -> None:
        """Wait until nothing is waiting."""
        if self.task is not None:
            await self.task


def not_kept() -> ApiError:
    return unavailable("feedback_unavailable", "the rating cannot be kept now: send it again later", 5)


def too_many(message: str) -> ApiError:
    return ApiError(429, "too_many_ratings", message)
