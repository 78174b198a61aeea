"""Maps subjects to lines of the journal: an SQLite index beside the files, built from them, and rebuilt if it is lost.

It holds neither texts nor names: for each line, hashes of its subject and exchange, its offset and its length. The files are
authoritative, so a reader checks each line that it finds through the index.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic_core import from_json, to_json

from llmcore.files import size
from llmcore.ratings import (
    ANSWERED,
    ASSIGNED,
    OUTGOING,
    RATED,
    SUBJECT,
    TENANT,
    TIME,
    TRANSACTION,
    Record,
    files,
)

NAME = "index.sqlite"
STEP_BYTES = 1 << 22  # of a file in one transaction: another gateway's rating waits no longer
WAIT_SECONDS = 10.0
VERSION = 1  # as the schema sets it
SETTINGS = "PRAGMA synchronous = NORMAL", "PRAGMA secure_delete = ON"  # of a connection
SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, name TEXT UNIQUE, inode INTEGER, size INTEGER);
CREATE TABLE IF NOT EXISTS lines (
    file INTEGER, place INTEGER, length INTEGER, kind TEXT, time TEXT, subject BLOB, exchange BLOB,
    PRIMARY KEY (file, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ratings (subject BLOB PRIMARY KEY, bytes INTEGER) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS more AFTER INSERT ON lines
WHEN new.kind IN ('rated', 'outgoing') AND new.subject IS NOT NULL BEGIN
    INSERT INTO ratings VALUES (new.subject, new.length) ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER IF NOT EXISTS less AFTER DELETE ON lines WHEN old.kind IN ('rated', 'outgoing') BEGIN
    UPDATE ratings SET bytes = bytes - old.length WHERE subject = old.subject;
END;
CREATE INDEX IF NOT EXISTS of_subject ON lines (subject, time, kind);
CREATE INDEX IF NOT EXISTS of_exchange ON lines (exchange, kind);
PRAGMA user_version = 1;
"""
SEEN = RATED, OUTGOING, ANSWERED  # kinds that a subject sees


class Place(NamedTuple):
    """A line: its file, its first byte and its bytes, its kind and its time (ISO 8601)."""

    path: Path
    place: int
    length: int
    kind: str
    time: str


def holder(subject: object, tenant: object) -> bytes:
    """The hash of a subject in its tenant."""
    return hashlib.blake2b(to_json([tenant, subject]), digest_size=8).digest()


def exchange(transaction: object) -> bytes:
    """The hash of an exchange."""
    return hashlib.blake2b(to_json(transaction), digest_size=8).digest()


def connected(folder: Path) -> sqlite3.Connection:
    """A connection to the index, which is created if there is none; any thread may close it."""
    path = folder / NAME
    database = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    for setting in SETTINGS:
        database.execute(setting)
    if database.execute("PRAGMA user_version").fetchone() != (VERSION,):
        database.executescript(SCHEMA)
        path.chmod(0o600)
    return database


@contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the index; one that SQLite cannot read is rebuilt. Raises OSError."""
    try:
        with closing(connected(folder)) as database:
            yield database
    except sqlite3.OperationalError as error:  # it is locked, or the disk is full
        raise OSError(str(error)) from error
    except sqlite3.DatabaseError as error:
        for name in NAME, f"{NAME}-wal", f"{NAME}-shm":
            (folder / name).unlink(missing_ok=True)
        raise OSError(f"the index was broken ({error}) and is being rebuilt") from error


def update(database: sqlite3.Connection, folder: Path, since: str = "") -> None:
    """Index what was added to the files. `since`: an hour; files of earlier hours are assumed to be unchanged."""
    paths = files(folder)
    entries = {
        name: (inode, size) for name, inode, size in database.execute("SELECT name, inode, size FROM files")
    }
    if not since:
        for name in entries.keys() - {path.name for path in paths}:
            drop(database, name)
    for path in paths:
        if path.stem.partition("-")[2] >= since:
            while more(path, entries.get(path.name)) and step(database, path):
                entries[path.name] = database.execute(
                    "SELECT inode, size FROM files WHERE name = ?", [path.name]
                ).fetchone()


def more(path: Path, entry: tuple[int, int] | None) -> bool:
    """Whether the file differs from the index's state."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return entry != (status.st_ino, status.st_size)


def step(database: sqlite3.Connection, path: Path) -> bool:
    """Index the next part of a file, in one transaction; whether there was one."""
    database.execute("BEGIN IMMEDIATE")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            row = database.execute("SELECT id, inode, size FROM files WHERE name = ?", [path.name]).fetchone()
            if row and (row[1] != status.st_ino or row[2] > status.st_size):  # lines were taken out of it
                drop(database, path.name)
                row = None
            number, _, begin = row or (None, 0, 0)
            if number is None:
                cursor = database.execute(
                    "INSERT INTO files (name, inode, size) VALUES (?, ?, 0)", [path.name, status.st_ino]
                )
                number = cursor.lastrowid
            file.seek(begin)
            end, rows = begin, list[tuple[object, ...]]()
            for line in file:
                if not line.endswith(b"\n") or end - begin > STEP_BYTES:
                    break  # it is being written, or comes with the next step
                rows.append((number, end, len(line), path.stem.partition("-")[0], *described(line)))
                end += len(line)
        database.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        database.execute("UPDATE files SET size = ? WHERE id = ?", [end, number])
    except FileNotFoundError:
        database.execute("ROLLBACK")
        return False
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
    return end > begin


def described(line: bytes) -> tuple[str, bytes | None, bytes | None]:
    """Time, subject and exchange of a line. A line torn by a power cut may belong to anyone: it has none."""
    try:
        record = from_json(line)
        return (
            str(record.get(TIME, "")),
            holder(record.get(SUBJECT), record.get(TENANT)),
            exchange(record.get(TRANSACTION)),
        )
    except (ValueError, AttributeError):
        return "", None, None


def drop(database: sqlite3.Connection, name: str) -> None:
    """Forget what is known of a file."""
    database.execute("DELETE FROM lines WHERE file = (SELECT id FROM files WHERE name = ?)", [name])
    database.execute("DELETE FROM files WHERE name = ?", [name])


def rated(database: sqlite3.Connection, transaction: object, most: int) -> int:
    """The number of ratings of an exchange, counted up to `most`."""
    query = "SELECT count(*) FROM (SELECT 1 FROM lines WHERE exchange = ? AND kind IN (?, ?) LIMIT ?)"
    [count] = database.execute(query, [exchange(transaction), RATED, OUTGOING, most]).fetchone()
    return int(count)


def ratings(database: sqlite3.Connection, folder: Path, transaction: object) -> list[Place]:
    """The ratings of an exchange."""
    rows = database.execute(
        "SELECT name, place, length, kind, time FROM lines JOIN files ON files.id = file WHERE exchange = ? AND kind = ?",
        [exchange(transaction), RATED],
    )
    return [Place(folder / name, *rest) for name, *rest in rows]


def answered(database: sqlite3.Connection, transaction: object, whose: bytes) -> bool:
    """Whether this exchange contains an answer to a holder, or its assignment to an arm."""
    query = "SELECT 1 FROM lines WHERE exchange = ? AND subject = ? AND kind IN (?, ?) LIMIT 1"
    return database.execute(query, [exchange(transaction), whose, ANSWERED, ASSIGNED]).fetchone() is not None


def rated_bytes(database: sqlite3.Connection, whose: bytes) -> int:
    """Bytes of the ratings by a holder."""
    row = database.execute("SELECT bytes FROM ratings WHERE subject = ?", [whose]).fetchone()
    return int(row[0]) if row else 0


def of(
    database: sqlite3.Connection, folder: Path, subject: str, tenant: str, before: str, most: int
) -> list[Place]:
    """The newest lines of a subject, of the kinds visible to it, newest first; only those older than `before` (ISO 8601) if it is
    set."""
    rows = database.execute(
        "SELECT name, place, length, kind, time FROM lines JOIN files ON files.id = file "
        "WHERE subject = ? AND kind IN (?, ?, ?) AND (? = '' OR time < ?) ORDER BY time DESC, name DESC, place DESC LIMIT ?",
        [holder(subject, tenant), *SEEN, before, before, most],
    )
    return [Place(folder / name, *rest) for name, *rest in rows]


def counted(database: sqlite3.Connection, subject: str, tenant: str, before: str = "") -> tuple[int, int]:
    """The number of a subject's lines that are visible to it and older than `before`, and the number of others."""
    visible, others = database.execute(
        "SELECT count(*) FILTER (WHERE kind IN (?, ?, ?) AND (? = '' OR time < ?)), "
        "count(*) FILTER (WHERE kind NOT IN (?, ?, ?)) FROM lines WHERE subject = ?",
        [*SEEN, before, before, *SEEN, holder(subject, tenant)],
    ).fetchone()
    return int(visible), int(others)


def concerned(database: sqlite3.Connection, folder: Path, subject: str, tenant: str) -> list[Path]:
    """The files with lines of a subject, or with torn ones, which may be its own."""
    rows = database.execute(
        "SELECT DISTINCT name FROM lines JOIN files ON files.id = file WHERE subject = ? OR subject IS NULL",
        [holder(subject, tenant)],
    )
    names = {name for [name] in rows}
    sizes = dict(database.execute("SELECT name, size FROM files"))
    return [path for path in files(folder) if path.name in names or size(path) != sizes.get(path.name, 0)]


def record_at(place: Place) -> Record | None:
    """The line's record; None if the file has been rewritten meanwhile."""
    try:
        with place.path.open("rb") as file:
            file.seek(place.place)
            record = from_json(file.read(place.length))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None
