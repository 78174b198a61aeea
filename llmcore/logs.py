"""Logs: one JSON object per line on stderr, with field names of the Elastic Common Schema.

Prompts and answers are never logged. An exception is logged with its type and traceback but without its message,
because messages (such as pydantic's) quote their input; those that nothing catches, too.
"""

import asyncio
import contextlib
import json
import logging
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TextIO

from pydantic_core import to_json


class JsonLines(logging.Formatter):
    """Formats a record, and the mapping given as `extra={"fields": {…}}`, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = record.__dict__.get("fields") or {}
        if record.exc_info and record.exc_info[1] is not None:
            fields = fields | exception_fields(record.exc_info[1])
        return line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)


def line(created: float, level: str, logger: str, message: str, fields: dict[str, object]) -> str:
    """One log line; `created` in seconds since the epoch."""
    head = {"@timestamp": timestamp(created), "log.level": level, "log.logger": logger, "message": message}
    entry = head | fields
    try:
        return to_json(entry).decode()
    except ValueError:  # a lone surrogate, as in a file name that is not UTF-8
        return json.dumps(entry, separators=(",", ":"), ensure_ascii=False)


def timestamp(created: float) -> str:
    """ISO 8601 in UTC, with milliseconds."""
    second = int(created)
    return f"{to_the_second(second)}.{int((created - second) * 1000):03d}+00:00"


@lru_cache(maxsize=2)
def to_the_second(second: int) -> str:
    """The part of the timestamp that all lines of a second share."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class Batched(logging.StreamHandler[TextIO]):
    """Writes the lines of one turn of the event loop together; warnings, and lines outside of a loop, at once."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.keep(self.format(record), record.levelno >= logging.WARNING)
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        fields = exception_fields(sys.exc_info()[1] or RuntimeError())
        text = line(record.created, "error", record.name, "a log line could not be written", fields)
        with contextlib.suppress(OSError, ValueError):  # stderr is gone
            self.stream.write(text + self.terminator)

    def keep(self, line: str, urgent: bool = False) -> None:
        """Queue `line` until the end of this turn, or write everything now if it is `urgent`."""
        self.lines.append(line + self.terminator)
        loop = asyncio._get_running_loop()
        if loop is None or urgent:
            self.flush()
        elif len(self.lines) == 1:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self.lines = self.lines, []
            self.stream.write("".join(lines))
            self.stream.flush()
        finally:
            self.release()


def info(log: logging.Logger, message: str, fields: dict[str, object]) -> None:
    """`log.info` at a third of its cost, for the line that every request logs. The caller checks `isEnabledFor`
    first.
    """
    match logging.root.handlers:
        case [Batched() as handler]:
            handler.keep(line(time.time(), "info", log.name, message, fields))
        case _:  # `configure` was not called, as in tests
            log.info(message, extra={"fields": fields})


def exception_fields(error: BaseException) -> dict[str, object]:
    """The error's type and traceback; never its message."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error.type": f"{type(error).__module__}.{type(error).__qualname__}",
        "error.stack_trace": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-20:]],
    }


def log_escaped(message: str, error: BaseException | None) -> None:
    """Log an exception that nothing caught."""
    fields = {} if error is None else exception_fields(error)
    logging.getLogger("llmcore").error(message, extra={"fields": fields})


def configure(level: str = "INFO") -> None:
    """Send every logger of this process to stderr as JSON lines, and what Python itself would print of exceptions."""
    sys.excepthook = lambda _, error, __: log_escaped("this process ends", error)
    threading.excepthook = lambda thread: log_escaped("a thread ends", thread.exc_value)
    sys.unraisablehook = lambda problem: log_escaped("an error could not be raised", problem.exc_value)
    handler = Batched()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # The format uses none of these, so spare their lookup for every record.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # typeshed lacks it
    for noisy in ("asyncio", "uvicorn", "uvicorn.error", "uvicorn.access", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def guard(loop: asyncio.AbstractEventLoop) -> None:
    """Log exceptions that reach the event loop by type and traceback; asyncio would print their messages too."""

    def escaped(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log_escaped("an error reached the event loop", context.get("exception"))

    loop.set_exception_handler(escaped)
