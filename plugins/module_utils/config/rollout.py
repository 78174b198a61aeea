"""How far a change of a host got that goes from host to host: on disk, so that a run after an interruption goes on, and on the
audit record.

`failed` never becomes `done`: a host whose change failed is `returned` to what it had before, or `stuck` and out of service.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files, formats

# Not ended: the next run goes on.
FORWARD = ("begun", "drained", "installed", "booting", "accepted", "answered")
BACKWARD = ("failed", "stuck")  # the next run tries the way back
RECORD_SECONDS = 5.0


class Failed(Exception):
    """A step; the message says why and what to do."""


@dataclass
class Progress:
    """What is saved. `step`: one of FORWARD or BACKWARD, `done`, `returned`, or empty if there never was a change."""

    step: str = ""
    wanted: str = ""  # what the host is to get
    cause: str = ""  # why it failed
    previous: dict[str, Any] = field(default_factory=dict)  # what it had before
    format: int = formats.FORMAT


@dataclass(frozen=True)
class Kind:
    """A kind of change. `action` begins the names of its events, `fields` are more of them."""

    title: str
    action: str
    operator: str
    fields: Callable[[Progress], dict[str, str]]


def load(path: Path) -> Progress:
    """What was saved; raises Failed where the file cannot be used."""
    try:
        document = json.loads(files.read(path))
        formats.require(path, document, Failed)
        return Progress(**document)
    except FileNotFoundError:
        return Progress()
    except (OSError, ValueError, TypeError) as error:
        raise Failed(
            f"{path} cannot be read ({error}): see on the host what runs, then move the file away"
        ) from error


def save(path: Path, progress: Progress) -> None:
    """Durably, for root alone."""
    files.make_directories(path.parent, 0o700)
    content = json.dumps(asdict(progress), indent=1) + "\n"
    files.write_file(path, content.encode(), os.geteuid(), os.getegid(), 0o600)


def on_record(audit: Path, kind: Kind, step: str, progress: Progress) -> None:
    """Return once the event is on the host's audit record; raises Failed.

    The writer's protocol, and the event's names, are those of payload/llmgpu/record.py.
    """
    event = {
        "event.kind": "event",
        "event.category": ["host"],
        "event.type": ["change"],
        "event.action": f"{kind.action}_{step}",
        "event.outcome": "failure" if step in (*BACKWARD, "returned") else "success",
        "event.reason": progress.cause[:500],
        "user.name": kind.operator,
        **kind.fields(progress),
    }
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(RECORD_SECONDS)
            connection.connect(str(audit))
            connection.sendall((json.dumps({"n": 1, "event": event}) + "\n").encode())
            answer = connection.makefile("rb").readline(4096)
    except OSError as error:
        raise Failed(
            f"{audit}: {error.strerror or error}, so {step} is not on the audit record: start llm-audit.service"
        ) from error
    if answer != b"1\n":
        raise Failed(f"{audit} answered {answer[:200]!r} to {step}")


def note(
    path: Path, audit: Path | None, kind: Kind, step: str, progress: Progress, log: Callable[[str], None]
) -> None:
    """Take a step: on record, where the host has one, then on disk. Only going back does not wait for the record."""
    progress.step = step
    try:
        if audit:
            on_record(audit, kind, step, progress)
    except Failed as problem:
        if step not in (*BACKWARD, "returned"):
            raise
        log(f"not on the audit record: {problem}")
    log(f"{kind.title} to {progress.wanted}: {step} {progress.cause}".strip())
    save(path, progress)
