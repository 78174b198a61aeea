"""Events for the host's audit record, handed to `llm-audit serve` on its socket."""

import json
import socket
from pathlib import Path

SECONDS = 5.0  # time for a record to reach the disk, as for the gateway's
ANSWER_BYTES = 4096


class RecordError(Exception):
    """An event could not be recorded; the message says why."""


def event(action: str, fields: dict[str, object]) -> dict[str, object]:
    """An event of the record, with the names of ECS."""
    return {
        "event.kind": "event",
        "event.category": ["host"],
        "event.type": ["change"],
        "event.action": action,
        "event.outcome": "success",
        **fields,
    }


def record(path: Path, action: str, fields: dict[str, object]) -> None:
    """Return once the event is on disk; raises RecordError."""
    line = json.dumps({"n": 1, "event": event(action, fields)}) + "\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(SECONDS)
            connection.connect(str(path))
            connection.sendall(line.encode())
            answer = b""
            while b"\n" not in answer and len(answer) < ANSWER_BYTES:
                if not (piece := connection.recv(ANSWER_BYTES)):
                    break
                answer += piece
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}: start llm-audit.service") from error
    if answer != b"1\n":
        raise RecordError(f"{path} answered {answer[:200].decode(errors='replace')!r} to '{action}'")
