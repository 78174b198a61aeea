"""Operators' orders to the watch: engines that they drained, GPUs that they declare repaired.

The file is root's, so that no service can forge an order; `llm-gpu watch` reads it and puts each order on the record.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from llmgpu.quarantine import StateError, parsed, unusable, write_json

REPAIRS = 100  # kept; the watch applies each within seconds


class OrderError(Exception):
    """An order that is refused; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Drain:
    """An engine that an operator has drained."""

    operator: str
    reason: str
    since: str


@dataclass(frozen=True, slots=True)
class Repair:
    """A GPU that an operator declared reset, repaired or inspected. `number` rises."""

    number: int
    uuid: str
    operator: str
    reason: str


@dataclass(slots=True)
class Orders:
    drains: dict[str, Drain] = field(default_factory=dict)  # by name of the engine
    ended: dict[str, Drain] = field(default_factory=dict)  # how an engine's last drain was taken back
    repairs: list[Repair] = field(default_factory=list)


def load(path: Path) -> Orders:
    """All orders; none if there is no file. Raises StateError."""
    content = parsed(path)
    if content is None:
        return Orders()
    try:
        drains, ended = (
            {name: Drain(**entry) for name, entry in content[kind].items()} for kind in ("drains", "ended")
        )
        return Orders(drains, ended, [Repair(**entry) for entry in content["repairs"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(unusable(path, error)) from error


@contextmanager
def edited(path: Path) -> Iterator[Orders]:
    """Read, change and replace the file, one process at a time; unchanged if the block raises. Raises StateError, OSError."""
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orders = load(path)
        yield orders
        write_json(path, asdict(orders))
    finally:
        os.close(lock)


def drain(orders: Orders, engine: str, operator: str, reason: str) -> None:
    """Drain an engine; raises OrderError if another operator has drained it."""
    current = orders.drains.get(engine)
    if current and current.operator != operator:
        raise OrderError(
            f"'{engine}' was drained by {current.operator} ({current.reason}): only that operator can change it"
        )
    orders.drains[engine] = Drain(operator, reason, current.since if current else now())


def undrain(orders: Orders, engine: str, operator: str, reason: str) -> None:
    """End a drain; raises OrderError unless this operator ordered it."""
    current = orders.drains.get(engine)
    if current is None:
        raise OrderError(
            f"no operator has drained '{engine}'. A quarantine by llm-gpu itself ends once its GPUs are healthy: `llm-gpu "
            f"status` says what is wrong with them"
        )
    if current.operator != operator:
        raise OrderError(
            f"'{engine}' was drained by {current.operator} ({current.reason}), not by {operator}: ask them to"
        )
    del orders.drains[engine]
    orders.ended[engine] = Drain(operator, reason, now())


def repaired(orders: Orders, uuid: str, operator: str, reason: str) -> None:
    """Declare a GPU repaired. Numbers rise even if the file is recreated, so that the watch misses none."""
    number = max(int(time.time()), orders.repairs[-1].number + 1 if orders.repairs else 0)
    orders.repairs = [*orders.repairs, Repair(number, uuid, operator, reason)][-REPAIRS:]


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
