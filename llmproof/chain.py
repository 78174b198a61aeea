"""The record's writer: JSON lines, each chained to the one before by SHA-256, on disk before they count.

A line is `{"event.sequence":N,"@timestamp":"…",` the event's own fields `,"llmkeep.audit.previous":"…",
"llmkeep.audit.hash":"…"}`: `previous` is the hash of the whole line before (64 zeros for the first), `hash` that of
this line's bytes before `,"llmkeep.audit.hash"`. Files are `records-FIRST.jsonl` by the first sequence number in
them, then `heads` and `verifier` (see heads.py), and `tree`, which only saves time and is never believed. `tip` is
the head that was to be signed last, without its signature: where signing fails, a witness learns from it what the tail was.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType

from llmproof import heads, retention
from llmproof.heads import Head, Signer, Tree, Verifier
from llmproof.retention import Start

MAX_LINE = 1 << 20  # bytes of an event's own fields
ROTATE = 64 << 20  # bytes of a file
FIRST_PREVIOUS = "0" * 64
PREVIOUS, HASH = "llmkeep.audit.previous", "llmkeep.audit.hash"
OURS = {"event.sequence", "@timestamp", PREVIOUS, HASH, retention.LAST, retention.HASH, retention.PEAKS}
TAIL = len(f',"{HASH}":""}}') + 64
# A damaged line may be of any length; more than this is never read at once.
READ = MAX_LINE + 4096
# How old a record without a head may be before the writer refuses the next one: a head each minute may come late once. A program
# that can write the folder can forge as much of the record's end.
UNSIGNED_SECONDS = 120.0
RECENT = 10  # heads among which the kept tree is looked for: a power cut may lose the newest


WITNESS_WAY_OUT = (
    "Nothing is signed. Save the folder; the witness's copy of this host's heads is on the control node. Then move the "
    "folder, the "
    "witness's copy and its statement on this host away, and keep them"
)


class ChainError(Exception):
    """The record cannot be continued. The message says what is wrong, the value seen, and what to do."""


class EventError(ValueError):
    """The event is refused. The message says why."""


def _unique(members: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; EventError for duplicate names, of which readers use different ones."""
    names = dict(members)
    if len(names) != len(members):
        twice = next(name for name, count in Counter(name for name, _ in members).items() if count > 1)
        raise EventError(f"{twice[:100]!r} is a duplicate: remove one")
    return names


def _finite(text: str) -> float:
    """A number; EventError for one that JSON does not have, or that readers turn into one."""
    number = float(text)
    if not math.isfinite(number):
        raise EventError(f"{text[:100]} is not a JSON number: send a smaller one, or null")
    return number


# Of messages: what it accepts means the same to every reader, so an event can be written in the bytes in which it came.
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)


def fields(event: object, text: str = "") -> bytes:
    """An event's own fields, encoded for the line; EventError if they cannot be. `text`: the event as JSON, which DECODER has
    accepted.
    """
    if not isinstance(event, Mapping) or not event:
        raise EventError("an event is a JSON object with at least one field")
    if taken := OURS & event.keys():
        raise EventError(f"the record itself writes {', '.join(sorted(taken))}: remove it")
    return _encoded(event, text)


def _encoded(event: Mapping[str, object], text: str = "") -> bytes:
    if not text or not text.isascii() or "\r" in text:  # some readers end a line at other characters, too
        try:
            text = json.dumps(event, separators=(",", ":"), allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise EventError(f"it is not JSON ({error})") from error
    if len(text) > MAX_LINE:
        raise EventError(f"it has {len(text)} bytes, but at most {MAX_LINE} are accepted")
    return text[1:-1].encode()


def problem(line: bytes, sequence: int, previous: str) -> str | None:
    """The fault of one line (without its newline) in its place; None if it is as written."""
    body = line[:-TAIL]
    if line[-TAIL:] != f',"{HASH}":"{hashlib.sha256(body).hexdigest()}"}}'.encode():
        return "changed: its own hash does not match"
    if not body.startswith(b'{"event.sequence":%d,"@timestamp":"' % sequence):
        return f"moved: it is intact, but number {sequence} is expected here"
    if not body.endswith(f',"{PREVIOUS}":"{previous}"'.encode()):
        return "rewritten: it follows another record than the one before it"
    return None


def named_previous(line: bytes) -> str:
    """The previous record's hash, as stated in the line."""
    return line[-TAIL - 65 : -TAIL - 1].decode(errors="replace")


def written_at(line: bytes) -> datetime:
    """The time in a valid line; ValueError for any other."""
    return datetime.fromisoformat(line[:120].split(b'"', 6)[5].decode())


def utc(moment: datetime) -> str:
    """The current time in the format of records and heads."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def lines(path: Path) -> Iterator[bytes]:
    """The file's lines with their newlines, which the last one and parts of an overlong one may lack."""
    with path.open("rb") as file:
        while line := file.readline(READ):
            yield line


def files(folder: Path) -> list[Path]:
    """The record's files in their order."""
    return sorted(folder.glob("records-*.jsonl"))


def first_of(path: Path) -> int:
    """The number of a file's first record, by its name."""
    return int(path.stem.removeprefix("records-"))


def file_name(first: int) -> str:
    """The name of the file whose first record has this number."""
    return f"records-{first:012d}.jsonl"


def witnessed(path: Path | None) -> Head:
    """The head that the witness saw last, from the file that it left on this host; of size 0 where there is none. ChainError."""
    try:
        return heads.stated(path.read_bytes())[1] if path else Head(0, b"")
    except FileNotFoundError:
        return Head(0, b"")
    except ValueError as error:
        raise ChainError(
            f"{path} cannot be read as the witness's statement ({error}): wait for its next run, or remove the file"
        ) from error


def _monotonic(line: bytes) -> float:
    """The time the line was written on the scale of time.monotonic(), if the clock was right; long ago if it has none."""
    try:
        return time.monotonic() - max(0.0, (datetime.now(UTC) - written_at(line)).total_seconds())
    except (ValueError, IndexError, TypeError):
        return -math.inf


class Chain:
    """The one writer of a folder. Not for several threads at once; `close` it, or use it in a `with`.

    `wait`: until another writer has gone, instead of refusing. `name`: who signs, noted when the record begins.
    `unsigned_seconds`: how old a record without a head may be before the next one is refused. `seen`: a file with the
    head, or tip, that the witness saw last; a record without it is not continued.
    """

    def __init__(
        self,
        folder: Path,
        seed: bytes,
        name: str = "",
        rotate: int = ROTATE,
        wait: bool = False,
        unsigned_seconds: float = UNSIGNED_SECONDS,
        seen: Path | None = None,
    ) -> None:
        """Lock and recover the record. Raises ChainError, HeadError, OSError; then nothing stays locked."""
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        self.folder, self.rotate = folder, rotate
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._file, self._size = -1, 0
        self.tree, self._previous, self._signed = Tree(), FIRST_PREVIOUS, 0
        self.unsigned_seconds = unsigned_seconds
        self._unsigned_since = math.inf  # by time.monotonic(), of the first record without a head
        self._seen_file, self._seen = seen, witnessed(seen)
        self._start = Start()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self._signer = self._signer_of(seed, name)
            self._recover()
        except BlockingIOError as error:
            self.close()
            raise ChainError(
                f"another process writes {folder}: stop it first, since there can be only one writer"
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def verifier(self) -> Verifier:
        """The key that signs the heads."""
        return self._signer.verifier

    def append(self, events: Sequence[Mapping[str, object]]) -> range:
        """Write all EVENTS or none; their sequence numbers, once they are on disk. EventError, OSError, ChainError."""
        return self.write([fields(event) for event in events])

    def write(self, bodies: Sequence[bytes]) -> range:
        """`append` for events that `fields` encoded."""
        if time.monotonic() - self._unsigned_since > self.unsigned_seconds:
            raise OSError(
                errno.ETIME,
                f"records have been without a signed head for more than {self.unsigned_seconds:g} s",
            )
        return self._write(bodies)

    def _write(self, bodies: Sequence[bytes]) -> range:
        self._must_be_open()
        if self._size >= self.rotate:
            self._start_file()
        now, since = utc(datetime.now(UTC)).encode(), time.monotonic()
        first, previous, written = self.tree.size + 1, self._previous, []
        for sequence, body in enumerate(bodies, first):
            line = b'{"event.sequence":%d,"@timestamp":"%b",%b,"%b":"%b"' % (
                sequence, now, body, PREVIOUS.encode(), previous.encode())  # fmt: skip
            hashed = hashlib.sha256(line)
            end = f',"{HASH}":"{hashed.hexdigest()}"}}'.encode()
            hashed.update(end)
            previous = hashed.hexdigest()
            written.append(line + end)
        self._size = self._put(self._file, b"".join(line + b"\n" for line in written), self._size)
        for line in written:
            self.tree.add(line)
        self._previous = previous
        self._unsigned_since = min(self._unsigned_since, since)
        return range(first, first + len(written))

    def sign(self) -> bytes | None:
        """Append a signed head to `heads` and return it; None if the last one covers all records. OSError, ChainError."""
        self._must_be_open()
        if self.tree.size == self._signed:
            return None
        head = Head(self.tree.size, self.tree.root(), utc(datetime.now(UTC)))
        self._replace("tip", head.text(self.verifier.name))
        note = self._signer.sign(head)
        path = self.folder / heads.NAME
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
        try:
            self._put(descriptor, note + b"\n", os.fstat(descriptor).st_size)
            if new:
                os.fsync(self._lock)
        finally:
            os.close(descriptor)
        self._signed, self._unsigned_since = self.tree.size, math.inf
        self._replace(
            "tree", "\n".join([str(self.tree.size), *(peak.hex() for peak in self.tree.peaks)]).encode()
        )
        return note

    def remove_oldest(self, now: datetime, keep_days: int) -> Path | None:
        """Declare the oldest file removed, sign that, and remove it; None if none may be removed. OSError, ChainError.

        It may where it is closed, signed and witnessed, and its records are older than KEEP_DAYS by NOW and by the
        witness's clock: a clock that is wrong for an hour removes nothing.
        """
        self._must_be_open()
        there = files(self.folder)
        for path in there[:-1]:
            if first_of(path) <= self._start.size:  # declared, and then the power failed
                self._remove(path)
                return path
        witness = witnessed(self._seen_file)
        if len(there) < 2 or first_of(there[1]) - 1 > min(self._signed, witness.size):
            return None
        if not witness.time or witness.size > self.tree.size:
            return None
        after = next(lines(there[1]), b"")
        limit = min(now, datetime.fromisoformat(witness.time)) - timedelta(days=keep_days)
        if not after or written_at(after) > limit:
            return None
        tree, previous = self._start.tree(), self._start.previous
        for line in lines(there[0]):
            whole = line.removesuffix(b"\n")
            if wrong := problem(whole, tree.size + 1, previous):
                raise ChainError(f"{there[0]}, record {tree.size + 1}: {wrong}. It is old enough to be removed, but was "
                    "kept: see "
                                 f"`llm-audit verify {self.folder}`")  # fmt: skip
            tree.add(whole)
            previous = hashlib.sha256(whole).hexdigest()
        reason = f"its records are older than {keep_days} days"
        self.write([_encoded(retention.declaration(tree, previous, reason))])
        self.sign()
        self._start = Start(tree.size, previous, tree.peaks)
        self._remove(there[0])
        return there[0]

    def _remove(self, path: Path) -> None:
        path.unlink()
        os.fsync(self._lock)

    def close(self) -> None:
        """Release the folder without signing a head."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def __enter__(self) -> "Chain":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ opening
    def _signer_of(self, seed: bytes, name: str) -> Signer:
        """The name that the record began with, or NAME; refuses a key other than the record's first."""
        path = self.folder / "verifier"
        known = Verifier(path.read_text()) if path.exists() else None
        signer = Signer(known.name if known else name or f"llm-audit/{socket.gethostname()}", seed)
        if known and signer.verifier.text != known.text:
            raise ChainError(f"{self.folder} is signed by {known.text}, but the given seed belongs to "
                f"{signer.verifier.text}: give the correct seed, or move the folder away and keep it")  # fmt: skip
        if not known:
            if files(self.folder) or (self.folder / heads.NAME).exists():
                raise ChainError(
                    f"{path} is missing, but the record exists: restore it, or move the folder away and keep it"
                )
            aside = self.folder / ".verifier.new"
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{signer.verifier.text}\n")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            os.fsync(self._lock)
        return signer

    def _recover(self) -> None:
        """Find the end of the record: verify the lines after the last head, and cut a torn one off."""
        path = self.folder / heads.NAME
        notes, torn = heads.read(path)
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))
        signed = [self.verifier.open(note) for note in notes[-RECENT:]]
        head = signed[-1] if signed else Head(0, Tree().root())
        self._signed = head.size
        self.tree = self._kept_tree(signed) or self.tree
        there = files(self.folder)
        if there and first_of(there[0]) > 1:
            self._start = retention.declared(there, head.size) or self._start
            there = [path for path in there if first_of(path) > self._start.size]
        if self.tree.size < self._start.size:
            self.tree, self._previous = self._start.tree(), self._start.previous
        firsts = [first_of(path) for path in there]
        # All lines behind the tree that is known, and the one before them, to whose hash they are chained.
        start = max((n for n, first in enumerate(firsts) if first <= self.tree.size), default=0)
        for path, first in zip(there[start:], firsts[start:], strict=True):
            good, sequence, wrong = 0, first, None
            if first != self.tree.size + 1 and not (path == there[start] and first <= self.tree.size):
                raise ChainError(f"{path} should begin with record {self.tree.size + 1}: records were removed, or a "
                                 "file renamed. Put it back, or move the folder away and keep it")  # fmt: skip
            for line in lines(path):
                if sequence >= self.tree.size:
                    wrong = self._take(line, sequence, head)
                    if wrong:
                        break
                good, sequence = good + len(line), sequence + 1
            if wrong and (sequence <= max(head.size, self._seen.size) or path != there[-1]):
                raise ChainError(f"{path}, record {sequence}: {wrong}. This is not the result of a power cut. The writer "
                    f"stops: see `llm-audit verify {self.folder}`, then move the folder away and keep it")  # fmt: skip
            if wrong:
                self._cut(path, good)
            self._size = good
        if self.tree.size < self._seen.size:
            raise ChainError(f"{self.folder} ends with record {self.tree.size}, but the witness has seen {self._seen.size}: "
                f"records were removed. {WITNESS_WAY_OUT}")  # fmt: skip
        if self.tree.size < head.size:
            raise ChainError(f"{self.folder} ends with record {self.tree.size}, but a head was signed over {head.size}: "
                "records were removed. Move the folder away and keep it")  # fmt: skip
        if there:
            self._file = os.open(there[-1], os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        else:
            self._start_file()
        # Also where the power failed between the cut and the record of it.
        cut = self.folder / f"cut-{self.tree.size + 1:012d}"
        if cut.exists():
            self._write([fields({"event.kind": "event", "event.category": ["process"], "event.action": "recovered",
                         "event.outcome": "success", "llmkeep.audit.dropped_bytes": cut.stat().st_size})])  # fmt: skip

    def _take(self, line: bytes, sequence: int, head: Head) -> str | None:
        """Add the next line to the state, or return its fault."""
        whole = line.removesuffix(b"\n")
        if not line.endswith(b"\n"):
            return "torn: its end is missing"
        if sequence == self.tree.size and sequence > 0:  # the last of the known ones: here for its hash only
            self._previous = hashlib.sha256(whole).hexdigest()
            return problem(whole, sequence, named_previous(whole))
        wrong = problem(whole, self.tree.size + 1, self._previous)
        if wrong:
            return wrong
        self.tree.add(whole)
        self._previous = hashlib.sha256(whole).hexdigest()
        if self.tree.size == head.size and self.tree.root() != head.root:
            return f"the head over the first {head.size} records does not match them"
        if self.tree.size == self._seen.size and self.tree.root() != self._seen.root:
            return f"the witness has seen other records up to this one. {WITNESS_WAY_OUT}"
        if self.tree.size == head.size + 1:
            self._unsigned_since = _monotonic(whole)
        return None

    def _kept_tree(self, signed: list[Head]) -> Tree | None:
        """The stored tree, if one of these heads has its size and root."""
        try:
            size, *peaks = (self.folder / "tree").read_text().split("\n")
            tree = Tree(int(size), [bytes.fromhex(peak) for peak in peaks])
        except (OSError, ValueError):
            return None
        fits = len(tree.peaks) == tree.size.bit_count() and Head(tree.size, tree.root()) in signed
        return tree if fits else None

    def _cut(self, path: Path, good: int) -> None:
        """Save the bytes after the first GOOD ones in a file named after the next record, then truncate."""
        with path.open("rb") as file:
            file.seek(good)
            dropped = file.read()
        with (self.folder / f"cut-{self.tree.size + 1:012d}").open("ab") as aside:
            aside.write(dropped)
            aside.flush()
            os.fsync(aside.fileno())
        os.fsync(self._lock)
        with path.open("r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())

    # ------------------------------------------------------------ writing
    def _must_be_open(self) -> None:
        if self._file < 0:
            raise ChainError(f"{self.folder} is closed, or a write and its rollback failed: open it again")

    def _replace(self, name: str, data: bytes) -> None:
        """Write a dispensable file: not synced, and skipped if there is no space."""
        aside = self.folder / f".{name}.new"
        with suppress(OSError):
            aside.write_bytes(data)
            aside.replace(self.folder / name)

    def _start_file(self) -> None:
        # One that is there already is empty: it is from a start that did not get further.
        name = self.folder / file_name(self.tree.size + 1)
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
        try:
            os.fsync(descriptor)
            os.fsync(self._lock)
        except OSError:
            os.close(descriptor)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = descriptor, 0

    def _put(self, descriptor: int, data: bytes, size: int) -> int:
        """Append DATA to a file of SIZE bytes and sync it; returns its new size. On failure the file is unchanged."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fdatasync(descriptor)
        except OSError:
            try:
                os.ftruncate(descriptor, size)
            except OSError:
                os.close(self._file)
                self._file = -1  # what is on disk now is not known: the next opening finds out
            raise
        return size + len(data)
