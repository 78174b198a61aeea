#!/usr/bin/python3
"""journal_count.py STATE: what the journal of this host holds since the last run, counted, a JSON line for each window.

The lines go to the journal and are shipped with it, so that `llmkeep logs check` can compare on the control node what was
written with what Elasticsearch has, also when this host is gone. A window is a run of sequence numbers without a hole, of 100
entries or a few more: it ends where the next entry is of another millisecond, which is how exactly a document knows its time, or
where the clock went back.

STATE holds the cursor of the last entry that was counted. Where the journal lost what came after it, the next window begins at a
later number than expected, and the check names what is between. A last line has the counters of Filebeat since its start.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SOCKET = "/run/filebeat/stats.sock"
WINDOW = 100  # entries: how exactly a gap is named
# Those of the fingerprint in processors.yml. Entries that have all of them in common are one document.
IDENTITY = (
    "__REALTIME_TIMESTAMP",
    "_MACHINE_ID",
    "_BOOT_ID",
    "_PID",
    "_TRANSPORT",
    "_SYSTEMD_UNIT",
    "SYSLOG_IDENTIFIER",
    "MESSAGE",
)


@dataclass
class Window:
    """Entries FIRST to LAST of the journal with identifier JOURNAL; times in milliseconds since 1970."""

    journal: str
    first: int
    last: int
    begins: int
    ends: int
    documents: set[str] = field(default_factory=set)

    def line(self) -> str:
        return json.dumps(
            {
                "@timestamp": iso(datetime.now(UTC).timestamp() * 1000),
                "message": "entries of the journal, counted",
                "event.action": "journal_counted",
                "llmkeep.journal.id": self.journal,
                "llmkeep.journal.from": self.first,
                "llmkeep.journal.to": self.last,
                "llmkeep.journal.entries": len(self.documents),
                "llmkeep.journal.first": iso(self.begins),
                "llmkeep.journal.last": iso(self.ends),
            }
        )


def iso(milliseconds: float) -> str:
    return (
        datetime.fromtimestamp(milliseconds / 1000, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def windows(entries: Iterable[dict[str, Any]]) -> Iterator[tuple[Window, str]]:
    """The windows of entries in their order, each with the cursor of its last one."""
    now: Window | None = None
    cursor = ""
    for entry in entries:
        journal, number = entry["__SEQNUM_ID"], int(entry["__SEQNUM"])
        milliseconds = int(entry["__REALTIME_TIMESTAMP"]) // 1000
        if now and (
            (journal, number) != (now.journal, now.last + 1)
            or milliseconds < now.ends
            or (now.last - now.first + 1 >= WINDOW and milliseconds > now.ends)
        ):
            yield now, cursor
            now = None
        if not now:
            now = Window(journal, number, number, milliseconds, milliseconds)
        now.last, now.ends, cursor = number, milliseconds, entry["__CURSOR"]
        # Of a message beyond 4 KiB journalctl prints null here: the cursor ends with a hash of all fields.
        long = cursor.rpartition(";x=")[2] if entry.get("MESSAGE", "") is None else ""
        now.documents.add(json.dumps([*(entry.get(name) for name in IDENTITY), long]))
    if now:
        yield now, cursor


def journal(after: str) -> Iterator[dict[str, Any]]:
    """Entries after a cursor, or all."""
    argv = ["journalctl", "--quiet", "--output=json", f"--output-fields={','.join(IDENTITY)}"]
    with subprocess.Popen(
        [*argv, *([f"--after-cursor={after}"] if after else [])], stdout=subprocess.PIPE
    ) as running:
        yield from map(json.loads, running.stdout or ())
    if running.returncode:
        sys.exit(
            f"journalctl ended with {running.returncode}, so later entries are not counted: see its message above"
        )


def shipped() -> str:
    """Filebeat's counters as a line; empty where it does not run."""
    link = http.client.HTTPConnection("filebeat")
    link.sock = socket.socket(socket.AF_UNIX)
    try:
        link.sock.settimeout(5)
        link.sock.connect(SOCKET)
        link.request("GET", "/stats")
        events = json.loads(link.getresponse().read())["libbeat"]["output"]["events"]
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        link.close()
    return json.dumps(
        {"message": "counters of Filebeat since its start", "event.action": "shipper_counted"}
        | {f"llmkeep.shipper.{name}": int(events[name]) for name in ("acked", "dropped", "duplicates")}
    )


def main() -> None:
    state = Path(sys.argv[1])
    for window, cursor in windows(journal(state.read_text() if state.exists() else "")):
        print(window.line(), flush=True)
        # After the line: a run that is killed between counts a window twice, which the check sees, rather than never.
        fresh = state.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(cursor)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(state)
    if line := shipped():
        print(line)


if __name__ == "__main__":
    main()
