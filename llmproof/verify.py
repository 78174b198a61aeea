"""Verify a record: every line, every link, every signed head; read-only, also while its writer is running.

The chain alone proves that no line was changed, removed, added or moved without rewriting all later ones. A head
excludes even that, up to its size. Heads kept elsewhere exclude it even for the holder of the key.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from llmproof import heads, retention
from llmproof.chain import UNSIGNED_SECONDS, file_name, files, first_of, lines, named_previous, problem, utc
from llmproof.heads import HeadError, Tree, Verifier
from llmproof.retention import Start

FINDINGS = 100  # that are told one by one
WRITER_SECONDS = 1.0  # how long a line may take until all of it stands there
CLOCK_SECONDS = 60.0  # that a writer's clock may have been put forward, or its disk have taken
PAIRS = ("transaction.id", "llmkeep.run.id")  # what an outcome has in common with its intent


@dataclass(frozen=True)
class Finding:
    """One deviation: file, line (from 1; 0 for the file itself), number of the expected record."""

    file: str
    line: int
    sequence: int
    what: str

    def __str__(self) -> str:
        """For people."""
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: record {self.sequence}: {self.what}" if self.sequence else f"{place}: {self.what}"


@dataclass
class Report:
    """`open_tail`: records behind the last head, protected by the chain alone.

    `late`: heads that came later than promised. `pending`: intents without an outcome. `removed`: last record removed
    by declared retention, according to record `removed_by`.
    """

    verifier: str
    records: int = 0
    heads: int = 0
    kept_heads: int = 0
    open_tail: int = 0
    late: int = 0
    first: str = ""
    last: str = ""
    recovered: int = 0
    removed: int = 0
    removed_by: int = 0
    removed_at: str = ""
    pending: int = 0
    pending_ids: list[str] = field(default_factory=list)
    altered: int = 0
    findings: list[Finding] = field(default_factory=list)

    def find(self, path: Path, line: int, sequence: int, what: str) -> None:
        """Add a finding; only the first ones are stored as text."""
        self.altered += 1
        if len(self.findings) < FINDINGS:
            self.findings.append(Finding(str(path), line, sequence, what))

    @property
    def ok(self) -> bool:
        """Whether nothing was altered. Pending intents are reported, but are not alterations."""
        return self.altered == 0

    @property
    def nothing(self) -> bool:
        """Whether there is neither a record nor a head that says there was one."""
        return self.ok and self.records == 0


def verify(
    folder: Path,
    verifier: Verifier,
    kept_heads: Path | None = None,
    unsigned_seconds: float = UNSIGNED_SECONDS,
    live: bool = False,
    each: Callable[[dict[str, object]], None] | None = None,
) -> Report:
    """Read the whole record. Raises OSError.

    `kept_heads`: a copy of `heads` from another host; `tips` beside it, where the witness has one, is compared too.
    `unsigned_seconds`: what the writer promised. `live`: it is at work, so that the tail is as old as it is now.
    `each`: gets each valid record that a head in the folder covers, while it is read; they are proved once the report is ok.
    """
    if kept_heads and not kept_heads.exists():
        raise FileNotFoundError(f"there are no kept heads {kept_heads}: give the file that the witness wrote")
    report = Report(verifier.text)
    # Heads first: the writer may go on meanwhile, and each of these covers less than what is read then.
    known = _heads(folder / heads.NAME, verifier, report)
    report.heads = len(known)
    copies = _heads(kept_heads, verifier, report) if kept_heads else []
    report.kept_heads = len(copies)
    if missing := {note for note, _ in copies} - {note for note, _ in known}:
        report.find(folder / heads.NAME, 0, 0, f"{len(missing)} of the {len(copies)} heads kept in {kept_heads} are not in "
                                               "it: heads were removed, or the record was signed again")  # fmt: skip
    at_size: dict[int, list[tuple[str, bytes]]] = {}
    tips = [(b"", head) for head in heads.tips(kept_heads.with_name(heads.TIPS))] if kept_heads else []
    for source, notes in (
        (str(folder / heads.NAME), known),
        (str(kept_heads), copies),
        ("the witness's tips", tips),
    ):
        for _, head in notes:
            at_size.setdefault(head.size, []).append((source, head.root))
    signed = max((head.size for _, head in known), default=0)
    there = files(folder)
    start = retention.declared(there, signed) if there and first_of(there[0]) > 1 else None
    reader = _Reader(report, at_size, start or Start(), signed, each)
    tree = reader.read(there)
    if start and reader.good_size < start.sequence:
        report.find(
            folder,
            0,
            start.sequence,
            "not proved: it declares records as removed, but no valid head covers it",
        )
    report.records = tree.size
    largest = max(at_size, default=0)
    if largest > tree.size:
        report.find(folder, 0, tree.size + 1, f"{largest - tree.size} records are missing at the end: a head was signed "
            f"over {largest}")  # fmt: skip
    report.open_tail = max(0, tree.size - signed)
    limit = unsigned_seconds + CLOCK_SECONDS
    sizes = [0, *(head.size for _, head in known)]
    report.late = sum(
        seconds(reader.after.get(size, ""), head.time) > limit
        for size, (_, head) in zip(sizes, known, strict=False)
    )
    since = reader.after.get(signed, "")
    if report.open_tail and (age := seconds(since, utc(datetime.now(UTC)) if live else report.last)) > limit:
        report.find(folder / heads.NAME, 0, signed + 1, f"unsigned for too long: it and all after it, {report.open_tail} records "
                    f"over {age:.0f} s, have no head; the writer promised one within {unsigned_seconds:g} s")  # fmt: skip
    return report


def seconds(start: str, end: str) -> float:
    """Seconds from one time to another; 0 if one of them is invalid."""
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _heads(path: Path, verifier: Verifier, report: Report) -> list[tuple[bytes, heads.Head]]:
    """The valid heads of a file, with their notes; the others become findings."""
    data = path.read_bytes() if path.exists() else b""
    notes, torn = heads.split(data)
    good: list[tuple[bytes, heads.Head]] = []
    at = 1
    for number, note in enumerate(notes, start=1):
        line, at = at, at + note.count(b"\n") + 1
        try:
            head = verifier.open(note)
        except HeadError as error:
            report.find(path, line, 0, f"head {number}: {error}")
            continue
        if good and head.size <= good[-1][1].size:
            report.find(path, line, 0, f"head {number} covers {head.size} records, the one before it {good[-1][1].size}: "
                "heads can only grow")  # fmt: skip
        good.append((note, head))
    if torn and not _grows(path, len(data)):
        report.find(path, at, 0, "the last head is torn: after a power cut, the writer removes it")
    return good


def _grows(path: Path, size: int) -> bool:
    """Whether a writer is running and this is its file."""
    end = time.monotonic() + WRITER_SECONDS
    while time.monotonic() < end:
        if path.stat().st_size > size:
            return True
        time.sleep(0.05)
    return False


class _Reader:
    """Reads the files in order; continues after damage with the bytes that are there, so that later damage is found too."""

    def __init__(
        self,
        report: Report,
        at_size: dict[int, list[tuple[str, bytes]]],
        start: Start,
        signed: int,
        each: Callable[[dict[str, object]], None] | None,
    ) -> None:
        self.report, self.at_size = report, at_size
        self.signed, self.each = signed, each
        self.tree, self.previous, self.due = start.tree(), start.previous, start.size + 1
        report.removed, report.removed_by, report.removed_at = start.size, start.sequence, start.at
        self.good_size, self.bad_heads = 0, False
        self.after: dict[
            int, str
        ] = {}  # by a head's size, the time of the first record that it does not cover
        self.open: Counter[str] = Counter()

    def read(self, there: list[Path]) -> Tree:
        """All files but those that are declared removed; the tree over all lines."""
        there = [path for path in there if first_of(path) >= self.due]
        for path in there:
            if path.name != file_name(self.due):
                self.report.find(path, 0, self.due, f"a file {file_name(self.due)} is expected here: a file was removed, "
                    "added or renamed")  # fmt: skip
            read = 0
            for number, line in enumerate(lines(path), start=1):
                read += len(line)
                if not line.endswith(b"\n") and path == there[-1] and _grows(path, read):
                    break  # the writer is just writing it
                self._line(path, number, line)
        waiting = {key: count for key, count in self.open.items() if count > 0}
        self.report.pending, self.report.pending_ids = sum(waiting.values()), list(waiting)[:20]
        return self.tree

    def _line(self, path: Path, number: int, line: bytes) -> None:
        whole, record = line.removesuffix(b"\n"), _parsed(line)
        wrong = problem(whole, self.due, self.previous or named_previous(whole))
        if not line.endswith(b"\n"):
            wrong = "cut: its end is missing; after a power cut, the writer removes it and records that"
        elif wrong is None and record is None:
            wrong = "not JSON, although its hashes match: not written by this writer"
        sequence, self.previous = self.due, hashlib.sha256(whole).hexdigest()
        number_inside = record.get("event.sequence") if record else None
        if wrong and wrong.startswith("moved") and isinstance(number_inside, int):
            sequence = number_inside
            if sequence > self.due:
                wrong = f"removed: record {sequence} is here, {sequence - self.due} before it are missing"
            else:
                wrong = f"moved or added: record {sequence} is here, {self.due} is expected"
        elif wrong:
            self.previous = ""  # what the next one was written after is not known, and it is not to blame
        if wrong:
            self.report.find(path, number, self.due, wrong)
        elif record:
            if self.tree.size == 0 or self.tree.size in self.at_size:
                self.after[self.tree.size] = str(record.get("@timestamp"))
            self._note(record)
            if self.each and sequence <= self.signed:
                self.each(record)
        self.due = sequence + 1
        self.tree.add(whole)
        self._check_heads(path, number)

    def _check_heads(self, path: Path, number: int) -> None:
        size = self.tree.size
        if size not in self.at_size:
            return
        root = self.tree.root()
        bad = sorted({source for source, signed in self.at_size[size] if signed != root})
        if not bad:
            self.good_size = size
        elif not self.bad_heads:
            # Each later one covers the same change and cannot fit either.
            self.bad_heads = True
            self.report.find(path, number, self.due - 1, f"rewritten: the head over the first {size} records in "
                             f"{' and '.join(bad)} does not match; something in records {self.good_size + 1} to {size} "
                             "differs from what was signed")  # fmt: skip

    def _note(self, record: dict[str, object]) -> None:
        """Update the totals by a valid record."""
        at = str(record.get("@timestamp", ""))
        self.report.first = self.report.first or at
        self.report.last = at
        self.report.recovered += record.get("event.action") == "recovered"
        phase = record.get("llmkeep.audit.phase")
        if phase not in ("intent", "outcome"):
            return
        key = str(next((record[name] for name in PAIRS if name in record), record.get("event.sequence")))
        self.open[key] += 1 if phase == "intent" else -1
        if self.open[key] == 0:
            del self.open[key]


def _parsed(whole: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(whole)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
