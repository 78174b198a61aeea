"""The quarantined engines of this host, with the reason and who quarantined them: a file that `llm-gpu watch` writes and gateways
read.

The watch owns the file and its folder; every other service may only read it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmcore.files import write_aside
from llmgpu.history import Seen, State
from llmgpu.xids import TABLE

WATCH = "llm-gpu"  # who quarantines by itself


class StateError(Exception):
    """The file cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One quarantined engine. `by`: WATCH, or the operator who drained it. `since`: ISO 8601, UTC."""

    socket: str
    by: str
    reason: str
    since: str


@dataclass(slots=True)
class Saved:
    """The watch's whole memory. `boot`: the boot in which it was written. `histories`: by UUID of the GPU.

    `repairs`: the operators' declarations that were applied, by their number.
    """

    boot: str = ""
    histories: dict[str, State] = field(default_factory=dict)
    quarantine: dict[str, Entry] = field(default_factory=dict)  # by name of the engine
    repairs: int = 0


def load(path: Path) -> Saved:
    """The saved state; an empty `Saved` if there is no file. Raises StateError."""
    content = parsed(path)
    if content is None:
        return Saved()
    try:
        return Saved(
            str(content["boot"]),
            {uuid: states(codes) for uuid, codes in content["histories"].items()},
            {name: Entry(**entry) for name, entry in content["quarantine"].items()},
            int(content["repairs"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(unusable(path, error)) from error


def states(codes: Mapping[str, Any]) -> State:
    """A GPU's history; codes that this release does not know are dropped."""
    return {
        int(code): Seen(bool(active), int(reboots))
        for code, (active, reboots) in codes.items()
        if int(code) in TABLE
    }


def save(path: Path, saved: Saved) -> None:
    """Replace the file, atomically and durably. Raises OSError."""
    content = {
        "boot": saved.boot,
        "histories": {
            uuid: {str(code): [xid.active, xid.reboots] for code, xid in state.items()}
            for uuid, state in saved.histories.items()
        },
        "quarantine": {name: asdict(entry) for name, entry in saved.quarantine.items()},
        "repairs": saved.repairs,
    }
    write_json(path, content)


def write_json(path: Path, content: object) -> None:
    """Replace a file that every service may read, whatever the umask. Raises OSError."""
    write_aside(path, json.dumps(content, indent=1) + "\n", 0o644)


def quarantined(path: Path) -> dict[str, Entry]:
    """The entries by the engine's socket, for a gateway; raises StateError."""
    return {entry.socket: entry for entry in load(path).quarantine.values()}


def serialized(saved: Saved) -> bytes:
    """The entries as JSON, for gateways of other hosts."""
    return json.dumps([asdict(entry) for entry in saved.quarantine.values()]).encode()


def received(content: bytes) -> dict[str, Entry]:
    """The entries of another host by the engine's socket there; raises ValueError."""
    try:
        entries = [
            Entry(**{name: str(value) for name, value in each.items()}) for each in json.loads(content)
        ]
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a list of quarantined engines ({type(error).__name__})") from error
    return {entry.socket: entry for entry in entries}


def parsed(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file does not exist. Raises StateError."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StateError(unusable(path, error)) from error
    if not isinstance(content, dict):
        raise StateError(unusable(path, TypeError("it is not an object")))
    return content


def unusable(path: Path, error: Exception) -> str:
    return f"{path} cannot be used ({type(error).__name__}: {error}): restore it, or remove it to start over"
