"""The witness: copies of signed heads of hosts' and replicas' records, out of their reach, and ours on a host.

Kept heads are never dropped: new heads are accepted only if they extend them. A host that rewrites its record,
even with its own key, cannot take back the heads kept here: `llm-audit verify --heads` compares its record with them.
"""

import base64
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from llmcore.files import append
from llmkeep import playbooks, source_tree
from llmkeep.durable import write
from llmkeep.places import Places
from llmkeep.record import findings, pods, sessions
from llmkeep.record import runs as record
from llmkeep.record.findings import Findings
from llmkeep.record.runs import RecordError
from llmproof import heads
from llmproof.chain import utc
from llmproof.heads import Head, HeadError, Verifier

KEPT = Places().witness  # of hosts, and `findings.json` of all
KEPT_OF_PODS = Path("/var/lib/llmkeep/witness-pods")
RECORD = Path("/var/log/llm-audit")  # of a serving host
USER = "llm-audit"  # that writes it, and as whom it is read
COPY = Path("/var/lib/llm-audit-witness")  # on the first other host: the control node's
SEEN = Path("/var/lib/llm-audit-seen")  # on a serving host, root's: `head`, what was seen last of its record
BLOCKS = "blocks"  # beside the heads that are kept: the hashes of their full blocks
BLOCK_BYTES = 4 << 20
BLOCKS_SECONDS = 24 * 3600
SECONDS = 20  # for one task on a host
MOST_BYTES = 1 << 20  # of a host's answer, which has 192 KiB of heads in base64
TAIL_BYTES = 4096  # has the last two heads
SIGNATURE = re.compile("\n\n— [^\n]+\n\n".encode())  # the end of a head
BEGINS = "record"  # the line before an answer, by playbooks/files/record_heads.py
READ, COMPARE = "Read new heads", "Compare the copy of the control node's heads"


class Altered(Exception):
    """A record or its heads were altered. The message names the host and the alteration."""


@dataclass(frozen=True)
class Kept:
    """The witnessed heads of one record."""

    folder: Path

    @property
    def path(self) -> Path:
        """The heads, one after the other."""
        return self.folder / heads.NAME

    def data(self) -> bytes:
        """All complete heads; a torn one is truncated first."""
        return self.path.read_bytes() if self.end()[0] else b""

    def end(self) -> tuple[int, bytes]:
        """Bytes of the complete heads, and the last one's note. A torn one is truncated first."""
        if not self.path.exists():
            return 0, b""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for length in (TAIL_BYTES, size):
                start = file.seek(max(0, size - length))
                tail = file.read()
                ends = [*([] if start else [0]), *(found.end() for found in SIGNATURE.finditer(tail))]
                if len(ends) > 1:
                    break
        if start + ends[-1] < size:
            os.truncate(self.path, start + ends[-1])
        return start + ends[-1], tail[ends[-2] : ends[-1] - 1] if len(ends) > 1 else b""

    def digest(self) -> str:
        """SHA-256 of what `split --bytes=4M --filter=sha256sum` prints of the heads, a line for each block.

        Lines of full blocks are stored for a day, so that a look reads one block at most, however many heads are kept.
        """
        stored, full = self.folder / BLOCKS, self.end()[0] // BLOCK_BYTES
        fresh = stored.exists() and time.time() - stored.stat().st_mtime < BLOCKS_SECONDS
        known = stored.read_bytes().splitlines(keepends=True)[:full] if fresh else []
        lines = known.copy()
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(len(known) * BLOCK_BYTES)
                while block := file.read(BLOCK_BYTES):
                    lines.append(f"{hashlib.sha256(block).hexdigest()}  -\n".encode())
        if len(known) < full:
            write(stored, b"".join(lines[:full]), 0o600)
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def seen(self) -> bytes:
        """The longest head or tip seen of the record, with the present time, in the format of `Head.text`; or empty."""
        known = heads.tips(self.folder / heads.TIPS)
        if last := self.end()[1]:
            known.append(heads.stated(last.partition(b"\n\n")[0] + b"\n")[1])
        if not known:
            return b""
        longest = max(known, key=lambda head: head.size)
        return Head(longest.size, longest.root, utc(datetime.now(UTC))).text(self.folder.name)

    def see(self, tip: bytes) -> None:
        """Store a host's tip if it extends the ones seen. ValueError for anything else."""
        _, head = heads.stated(tip)
        if head.size > (heads.stated(seen)[1].size if (seen := self.seen()) else 0):
            append(self.folder / heads.TIPS, tip + b"\n")

    def extend(self, verifier: str, prefix: str, new: bytes) -> int:
        """Append the new heads; returns their number. Raises Altered, and appends none, unless they extend the kept ones.

        `prefix`: `digest` of the host's file up to the length kept here.
        """
        host, known, (kept, last) = self.folder.name, self.folder / "verifier", self.end()
        way_out = f"Examine {host} before anything else; the kept heads stay in {self.folder}"
        before = known.read_text().strip() if known.exists() else ""
        set_up_anew = f"if {host} was reinstalled, move that folder away and keep it"
        try:
            key = Verifier(verifier)
        except HeadError:  # its message quotes the host, as those below do
            if before:
                raise Altered(
                    f"{host} lost its verifier, formerly {before}. {way_out}; {set_up_anew}"
                ) from None
            raise Altered(
                f"{host} returned an invalid answer without a verifier. Examine that host"
            ) from None
        signer = pods.one_line(key.text)
        if before and before != key.text:
            raise Altered(f"{host} now signs as {signer}, formerly as {before}. {way_out}; {set_up_anew}")
        if prefix != self.digest():
            raise Altered(f"the heads on {host} do not begin with the {kept} bytes kept here: one is missing or "
                          f"changed. {way_out}")  # fmt: skip
        notes, _ = heads.split(new)
        try:
            size = key.open(last).size if last else 0
            for note in notes:
                head = key.open(note)
                if head.size <= size:
                    raise Altered(
                        f"a new head on {host} covers {head.size} records, the previous one {size}. {way_out}"
                    )
                size = head.size
        except HeadError:
            raise Altered(f"a new head on {host} was not signed by {signer}. {way_out}") from None
        if not before:
            write(known, f"{key.text}\n".encode(), 0o444)
        if notes:
            append(self.path, b"".join(note + b"\n" for note in notes))
        return len(notes)


def collect(inventories: list[str], clusters: Path | None = None) -> int:
    """Collect new heads from every serving host and every replica in CLUSTERS, and give ours to the first other host.

    Returns 1 if a record could not be read, else 0. Raises Altered, after all were checked, while any finding is not
    acknowledged; each finding is put on record once. RecordError.
    """
    root = source_tree.located()
    places = [playbooks.inventory_path(place, root) for place in inventories]
    for folder in (KEPT, KEPT_OF_PODS):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone():
        known = findings.load(KEPT) or Findings()
        altered: list[str] = []
        results, reports = _of_hosts(places)
        unheard = _by_source(results.failures)
        try:
            reports += _of_replicas(pods.replicas(clusters))
        except RecordError as error:
            unheard["clusters"] = str(error)
        for folder, answer in reports:
            try:
                if problem := _keep(folder, answer):
                    unheard[folder.name] = problem
            except Altered as error:
                altered.append(str(error))
        try:
            altered += sessions.collect(
                KEPT, {host: text for (task, host), text in results.outputs.items() if task == sessions.READ}
            )
        except RecordError as error:
            unheard["sessions"] = str(error)
        compared = [(host, text) for (task, host), text in results.outputs.items() if task == COMPARE]
        try:
            if compared or len(results.hosts) > 1:
                unheard |= _give(places, compared)
            else:
                print(
                    "llmkeep audit: no other host keeps this node's heads: the estate has one host",
                    file=sys.stderr,
                )
        except Altered as error:
            altered.append(str(error))
        known.add(altered, unheard)
        known.save(KEPT)
        for problem in unheard.values():
            print(f"llmkeep audit: {problem}", file=sys.stderr)
        if known.altered:
            _on_record(known)
            raise Altered("; ".join(each.what for each in known.altered.values())
                          + ". `llmkeep audit findings` lists it until it is acknowledged")  # fmt: skip
    return int(bool(unheard))


def _all_kept(place: Path) -> tuple[dict[str, int], dict[str, bytes]]:
    """By the folders in PLACE: how many bytes of heads are kept, and what was seen last."""
    kept = {folder.name: Kept(folder) for folder in place.iterdir() if folder.is_dir()}
    lengths = {name: each.end()[0] for name, each in kept.items()}
    return lengths, {name: text for name, each in kept.items() if (text := each.seen())}


def _of_hosts(places: list[Path]) -> tuple[playbooks.RunResults, list[tuple[Path, str | pods.Unheard]]]:
    """The results of all hosts, and each host's report on its record by the folder of its copy."""
    lengths, seen = _all_kept(KEPT)
    encoded = {host: base64.b64encode(text).decode() for host, text in seen.items()}
    results = _play(
        places,
        "read",
        {"witness_kept": lengths, "witness_seen_head": encoded, "witness_sessions": sessions.numbers(KEPT)},
    )
    return results, [(KEPT / host, text) for (task, host), text in results.outputs.items() if task == READ]


def _of_replicas(replicas: list[pods.Replica]) -> Iterator[tuple[Path, str | pods.Unheard]]:
    """Each replica's report on its record, by the folder of its copy."""
    for name, report in pods.ask(replicas, *_all_kept(KEPT_OF_PODS)):
        yield KEPT_OF_PODS / name, report


def acknowledge(number: str, reason: str) -> str:
    """Record that an operator acknowledges finding NUMBER, then delete it; returns it. On RecordError it stays."""
    with alone():
        known = findings.load(KEPT) or Findings()
        if number not in known.altered:
            raise RecordError(
                f"there is no finding {number!r}: `llmkeep audit findings` lists those that are open"
            )
        found = known.altered.pop(number)
        record.append({"event.kind": "event", "event.category": ["intrusion_detection"], "event.action": "acknowledge",
                       "event.outcome": "success", "event.reason": reason, "user.name": record.who(),
                       "llmkeep.witness.id": number, "llmkeep.witness.since": found.since,
                       "llmkeep.witness.finding": found.what})  # fmt: skip
        known.save(KEPT)
    return found.what


def _play(places: list[Path], tag: str, variables: dict[str, object]) -> playbooks.RunResults:
    settings = {
        "witness_user": USER,
        "witness_seconds": SECONDS,
        "witness_record": str(RECORD),
        "witness_copy": str(COPY),
        "witness_own": str(record.FOLDER),
        "witness_seen": str(SEEN),
        "witness_ledger": str(sessions.LEDGER),
    }
    with tempfile.NamedTemporaryFile(
        "w", suffix=".json"
    ) as file:  # one argument has 128 KiB at most, 700 hosts
        json.dump(settings | variables, file)
        file.flush()
        code, results = playbooks.play(
            source_tree.located() / "playbooks/witness.yml",
            places,
            ["--tags", tag, "--extra-vars", f"@{file.name}"],
            quiet=True,
            asked=frozenset({READ, COMPARE, sessions.READ}),
            most_bytes=MOST_BYTES,
        )
    if code and not results.failures:
        results.failures.append(
            "the hosts could not be queried: run playbooks/witness.yml by hand to see why"
        )
    return results


def _by_source(failures: list[str]) -> dict[str, str]:
    """Failed tasks by their host, the first word of each."""
    return {failure.partition(":")[0]: pods.one_line(failure) for failure in failures}


def _keep(folder: Path, report: str | pods.Unheard) -> str:
    """Process one answer: verifier, hash of the kept heads, new heads, tip. Returns why it could not be used, or ""."""
    if isinstance(report, pods.Unheard):
        return str(report)
    lines = report.splitlines()  # a terminal on the way writes \r\n
    answer = lines[lines.index(BEGINS) + 1 :] if BEGINS in lines else []
    verifier, prefix, new, tip = (*answer, "", "", "", "")[:4]
    host = folder.name
    if verifier == "shut":
        return (
            f"the volume with the audit record of {host} is locked, so the record cannot be read: examine that host if "
            "this persists"
        )
    if verifier == "none" and not (folder / "verifier").exists():
        return f"{host} keeps no audit record: is llm-audit running there?"
    try:
        heads_of_it, tip_of_it = (base64.b64decode(each, validate=True) for each in (new, tip))
        folder.mkdir(mode=0o700, exist_ok=True)
        Kept(folder).extend(verifier + "\n", prefix, heads_of_it)
        if tip_of_it:
            Kept(folder).see(tip_of_it)
    except ValueError:  # its message quotes the host
        raise Altered(f"{host} returned invalid heads or an invalid tip. Examine that host") from None
    return ""


def _give(places: list[Path], compared: list[tuple[str, str]]) -> dict[str, str]:
    """Give our heads to the first other host if it has fewer; Altered if ours do not extend its copy.

    Returns problems by source.
    """
    own = record.FOLDER / heads.NAME
    if not own.exists():
        return {
            "this node": f"there are no heads in {record.FOLDER} to copy to another host: create a record with `llmkeep "
            "audit init`"
        }
    if not compared:
        return {
            "this node": "no other host keeps this node's heads: there is no other host, or it did not answer"
        }
    ours, ((host, text), *_) = own.read_bytes(), compared
    size, prefix = ("", "", *text.split())[-2:]  # a shell may print something before
    if (
        not re.fullmatch("[0-9]{1,15}", size)
        or prefix != hashlib.sha256(ours[: int(size)]).hexdigest()
        or int(size) > len(ours)
    ):
        raise Altered(
            f"{host} holds other heads of this node in {COPY} than the beginning of {own}: one of the two was changed, "
            "or this node was restored from a backup older than those. Nothing was copied; examine both, then move "
            f"{host}'s copy away and keep it"
        )
    return {} if int(size) == len(ours) else _by_source(_play(places, "give", {}).failures)


def _on_record(known: Findings) -> None:
    """Record new findings; the next run retries any that cannot be recorded."""
    new = [each for each in known.altered.values() if not each.recorded]
    if not new:
        return
    try:
        record.append({"event.kind": "alert", "event.category": ["intrusion_detection"], "event.action": "witness",
                       "event.outcome": "failure", "event.reason": [each.what for each in new]})  # fmt: skip
    except RecordError as error:
        print(f"llmkeep audit: {error}", file=sys.stderr)
        return
    for each in new:
        each.recorded = True
    known.save(KEPT)


@contextmanager
def alone() -> Iterator[None]:
    """Lock the witness's folder; wait while another run holds it, as the timer's does for seconds."""
    descriptor = os.open(KEPT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
