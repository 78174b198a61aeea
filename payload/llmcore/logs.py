"""Logs: one JSON object a line on stderr, fields named after the Elastic Common Schema.

Prompts and answers are never logged. An exception is logged by its type and the lines it passed, without its
message, because messages (pydantic's, for one) quote the input.
"""

import asyncio
import json
import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TextIO

from pydantic_core import to_json


class JsonLines(logging.Formatter):
    """Formats a record, and the mapping given as `extra={"fields": {…}}`, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        fields: dict[str, object] = record.__dict__.get("fields") or {}
        if record.exc_info and record.exc_info[1] is not None:
            fields = fields | exception_fields(record.exc_info[1])
        return line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)


def line(created: float, level: str, logger: str, message: str, fields: dict[str, object]) -> str:
    """One line, `created` at that second since the epoch."""
    head = {"@timestamp": timestamp(created), "log.level": level, "log.logger": logger, "message": message}
    entry = head | fields
    try:
        return to_json(entry).decode()
    except ValueError:  # half of a character, as in the name of a file that is not UTF-8
        return json.dumps(entry, separators=(",", ":"), ensure_ascii=False)


def timestamp(created: float) -> str:
    """In UTC, to the millisecond."""
    second = int(created)
    return f"{to_the_second(second)}.{int((created - second) * 1000):03d}+00:00"


@lru_cache(maxsize=2)
def to_the_second(second: int) -> str:
    """What the lines of a second have in common."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class Batched(logging.StreamHandler[TextIO]):
    """What one turn of the event loop tells is written at once; a warning, and what is told outside of it, at once."""

    def __init__(self) -> None:
        """On stderr."""
        super().__init__(sys.stderr)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line, or write it with those before it."""
        try:
            self.keep(self.format(record), record.levelno >= logging.WARNING)
        except Exception:
            self.handleError(record)

    def keep(self, line: str, urgent: bool = False) -> None:
        """Until the end of this turn, unless it is `urgent`."""
        self.lines.append(line + self.terminator)
        loop = asyncio._get_running_loop()
        if loop is None or urgent:
            self.flush()
        elif len(self.lines) == 1:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write."""
        self.acquire()
        try:
            lines, self.lines = self.lines, []
            self.stream.write("".join(lines))
            self.stream.flush()
        finally:
            self.release()


def info(log: logging.Logger, message: str, fields: dict[str, object]) -> None:
    """What `log.info` says, at a third of its cost: for a line that each request has. Who calls has asked `isEnabledFor`."""
    match logging.root.handlers:
        case [Batched() as handler]:
            handler.keep(line(time.time(), "info", log.name, message, fields))
        case _:  # nobody has configured them
            log.info(message, extra={"fields": fields})


def exception_fields(error: BaseException) -> dict[str, object]:
    """The error's type and the code lines it passed; never its message."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error.type": f"{type(error).__module__}.{type(error).__qualname__}",
        "error.stack_trace": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-20:]],
    }


def configure(level: str = "INFO") -> None:
    """Send every logger of this process to stderr as JSON lines."""
    handler = Batched()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # What no line says is not looked up for each of them.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # typeshed lacks it
    for noisy in ("asyncio", "uvicorn", "uvicorn.error", "uvicorn.access", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def guard(loop: asyncio.AbstractEventLoop) -> None:
    """Log what escapes into the event loop by type and code lines; asyncio would print its message too."""

    def escaped(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        fields = exception_fields(error) if isinstance(error, BaseException) else {}
        logging.getLogger("asyncio").error("an error reached the event loop", extra={"fields": fields})

    loop.set_exception_handler(escaped)
