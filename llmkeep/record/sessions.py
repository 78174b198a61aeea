"""Copy operators' sudo sessions from the hosts' ledgers (role operators) into the control node's record.

The last copied line of each host is kept beside its heads. Lines are chained, so a ledger must continue from that
line: a rewritten or shortened ledger is a finding.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llmkeep.durable import write
from llmkeep.record import runs
from llmkeep.record.runs import Event, RecordError
from llmproof.chain import DECODER, files, lines

NAME = "sessions"  # in the witness's folder of a host: the last line
LEDGER = Path("/var/lib/llmkeep-sudo-output/ledger")  # on a host
READ = "Read new sessions"  # task of playbooks/witness.yml
BEGINS = "sessions"  # the line before an answer, by playbooks/files/operator_sessions.py
BREAKGLASS = "breakglass"
LONGEST_LINE, LONGEST, MOST_WORDS = 8192, 1024, 32
SESSION = re.compile(r"([a-z][a-z0-9-]{0,30})-[0-9]{8}T[0-9]{6}-[0-9A-Za-z]{6}")
HASH = re.compile("[0-9a-f]{64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
FIELD = "llmkeep.session.line"  # of an event: the hash of the ledger's line


@dataclass(frozen=True)
class Session:
    """A line of a ledger. `arguments`: None also where they are not to be read. `exit`: 0 to 255."""

    number: int
    session: str
    user: str
    started: str | None
    run_as: str | None
    command: str | None
    arguments: list[str] | None
    exit: int | None
    interrupted: bool
    bytes: int
    sha256: str
    previous: str

    def event(self, host: str, line: str) -> Event:
        """The session's event in the record; LINE: the hash of the ledger's line."""
        outcome = "unknown" if self.exit is None else "failure" if self.exit else "success"
        fields: Event = {
            "event.kind": "alert" if self.user == BREAKGLASS else "event",
            "event.category": ["process"],
            "event.action": "sudo",
            "event.outcome": outcome,
            "event.start": self.started,
            "host.name": host,
            "user.name": self.user,
            "user.effective.name": self.run_as,
            "process.executable": self.command,
            "process.args": self.arguments,
            "process.exit_code": self.exit,
            "llmkeep.session.id": self.session,
            "llmkeep.session.interrupted": self.interrupted,
            "llmkeep.session.bytes": self.bytes,
            "llmkeep.session.sha256": self.sha256,
            "llmkeep.session.number": self.number,
            FIELD: line,
        }
        return {name: value for name, value in fields.items() if value is not None}


def hash_of(line: bytes) -> str:
    """Of a line without its end, as the next one names it."""
    return hashlib.sha256(line).hexdigest()


def _is_text(field: object) -> bool:
    return isinstance(field, str) and len(field) <= LONGEST and field.isascii() and field.isprintable()


def _is_number(field: object, most: int, least: int = 0) -> bool:
    return type(field) is int and least <= field <= most


def parsed(line: bytes) -> Session:
    """A line that role operators could have written. ValueError for any other, naming at most a field."""
    if len(line) > LONGEST_LINE:
        raise ValueError("its length")
    try:
        session = Session(**DECODER.decode(line.decode("ascii")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its form") from None
    name = SESSION.fullmatch(session.session) if _is_text(session.session) else None
    words = session.arguments
    fitting = {
        "number": _is_number(session.number, 10**9, least=1),
        "session": name is not None,
        "user": name is None or name[1] == session.user,
        "started": session.started is None or _is_time(session.started),
        "run_as": session.run_as is None or _is_text(session.run_as),
        "command": session.command is None or _is_text(session.command),
        "arguments": words is None or (session.user != BREAKGLASS and _are_words(words)),
        "exit": session.exit is None or _is_number(session.exit, 255),
        "interrupted": type(session.interrupted) is bool,
        "bytes": _is_number(session.bytes, 1 << 50),
        "sha256": _is_text(session.sha256) and HASH.fullmatch(session.sha256) is not None,
        "previous": _is_text(session.previous) and HASH.fullmatch(session.previous) is not None,
    }
    if wrong := [field for field, fits in fitting.items() if not fits]:
        raise ValueError(", ".join(wrong))
    return session


def _is_time(field: object) -> bool:
    if not isinstance(field, str) or not TIME.fullmatch(field):
        return False
    try:
        datetime.fromisoformat(field)
    except ValueError:
        return False
    return True


def _are_words(field: object) -> bool:
    return (
        isinstance(field, list)
        and len(field) <= MOST_WORDS
        and all(map(_is_text, field))
        and sum(map(len, field)) <= LONGEST
    )


@dataclass(frozen=True)
class Ledger:
    """What is known of a host's ledger: its last line that was taken, in FOLDER, the witness's of that host."""

    folder: Path

    @property
    def path(self) -> Path:
        """The last line."""
        return self.folder / NAME

    def last(self) -> bytes:
        """Without its end; empty before the first look."""
        return self.path.read_bytes().removesuffix(b"\n") if self.path.exists() else b""

    def number(self) -> int:
        """Of the last line; 0 before the first look. RecordError."""
        try:
            return parsed(last).number if (last := self.last()) else 0
        except ValueError as error:
            raise RecordError(
                f"{self.path} was not written by the witness ({error}): examine the control node, then move the file away "
                "and keep it"
            ) from error

    def take(self, line: bytes) -> None:
        """Keep LINE as the last one."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        write(self.path, line + b"\n", 0o600)

    def extension(self, answer: str) -> tuple[list[tuple[bytes, Session]], str]:
        """The lines in ANSWER that extend the copied ones, and why the others do not; empty if all do."""
        host, last, taken = self.folder.name, self.last(), self.number()
        way_out = (
            f"Save {LEDGER.parent} on {host} and {self.path} before anything else; if {host} was reinstalled, move "
            f"{self.path} away and keep it"
        )
        words = answer.splitlines()  # a terminal on the way writes \r\n
        text = "".join(words[words.index(BEGINS) + 1 :]) if BEGINS in words else "none"
        try:
            new = [] if text == "none" else base64.b64decode(text, validate=True).split(b"\n")[:-1]
        except ValueError:
            return [], f"{host} returned an invalid ledger of sessions. {way_out}"
        if last and new[:1] != [last]:
            return [], f"the ledger of sessions on {host} has no line {taken} as it was copied. {way_out}"
        good: list[tuple[bytes, Session]] = []
        for line in new[1:] if last else new:
            number = taken + len(good) + 1
            try:
                session = parsed(line)
            except ValueError as error:
                return (
                    good,
                    f"line {number} of the ledger of sessions on {host} is invalid: {error}. {way_out}",
                )
            before = good[-1][0] if good else last
            if before and (session.number, session.previous) != (number, hash_of(before)):
                return (
                    good,
                    f"line {number} of the ledger of sessions on {host} does not follow the one before. {way_out}",
                )
            good.append((line, session))
        return good, ""


def numbers(place: Path) -> dict[str, int]:
    """By host, the number of the last line that was taken, in the witness's folder PLACE; none of a damaged one."""
    taken = {}
    for path in place.glob(f"*/{NAME}"):
        with suppress(RecordError):  # as `collect` raises
            taken[path.parent.name] = Ledger(path.parent).number()
    return taken


def collect(place: Path, answers: Mapping[str, str]) -> list[str]:
    """Record new sessions of all hosts, all at once and only once; returns contradictions to lines copied before.

    PLACE: the witness's folder. RecordError, and then none is taken.
    """
    extensions = {host: Ledger(place / host).extension(answer) for host, answer in answers.items()}
    events = {
        (host, digest): session.event(host, digest)
        for host, (new, _) in extensions.items()
        for line, session in new
        if (digest := hash_of(line))
    }
    if events:
        # A look that was cut off has put them on record, and did not take them.
        for each in _on_record():
            events.pop(each, None)
        runs.append(*events.values())
    for host, (new, _) in extensions.items():
        if new:
            Ledger(place / host).take(new[-1][0])
    return [problem for _, problem in extensions.values() if problem]


def _on_record() -> Iterator[tuple[str, str]]:
    """Host and hash of each ledger's line that the control node's record has."""
    for path in files(runs.FOLDER):
        for line in lines(path):
            if f'"{FIELD}":'.encode() in line:
                with suppress(ValueError, KeyError):  # `llmkeep audit verify` tells of a damaged one
                    event = json.loads(line)
                    yield event["host.name"], event[FIELD]
