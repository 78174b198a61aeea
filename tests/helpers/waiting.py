"""Waiting in tests of processes, with patience, since the machine may be busy."""

import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 30
# Below those that Linux gives to connections, and a part of them for each of pytest's workers.
FIRST_PORT, PORTS = 12_000, 2_000


def until(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Until it holds; TimeoutError where it never does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"it has not come in {seconds} s")
        time.sleep(0.02)


def listens(path: Path) -> bool:
    """Whether a process listens on a UNIX socket, according to the kernel; the file exists a moment earlier."""
    accepts = 1 << 16  # __SO_ACCEPTCON
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(len(row) == 8 and row[7] == str(path) and int(row[3], 16) & accepts for row in rows)


def _ports() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = random.randrange(PORTS)  # noqa: S311 - no secret
    for number in range(PORTS):
        yield FIRST_PORT + PORTS * worker + (first + number) % PORTS


_unused = _ports()


def own_port() -> int:
    """A free port of 127.0.0.1 for a program that needs one as an argument; it is not handed out again by chance."""
    for port in _unused:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is left")
