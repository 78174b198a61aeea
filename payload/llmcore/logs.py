"""Logs: one JSON object a line on stderr, fields named after the Elastic Common Schema.

Prompts and answers are never logged. An exception is logged by its type and the lines it passed, without its
message, because messages (pydantic's, for one) quote the input.
"""

import asyncio
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """Formats a record, and the mapping given as `extra={"fields": {…}}`, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry: dict[str, object] = {
            "@timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "log.level": record.levelname.lower(),
            "log.logger": record.name,
            "message": record.getMessage(),
        }
        fields = record.__dict__.get("fields")
        if fields:
            entry.update(fields)
        if record.exc_info and record.exc_info[1] is not None:
            entry.update(exception_fields(record.exc_info[1]))
        return json.dumps(entry, separators=(",", ":"), ensure_ascii=False)


def exception_fields(error: BaseException) -> dict[str, object]:
    """The error's type and the code lines it passed; never its message."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error.type": f"{type(error).__module__}.{type(error).__qualname__}",
        "error.stack_trace": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-20:]],
    }


def configure(level: str = "INFO") -> None:
    """Send every logger of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("asyncio", "uvicorn", "uvicorn.error", "uvicorn.access", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def guard(loop: asyncio.AbstractEventLoop) -> None:
    """Log what escapes into the event loop by type and code lines; asyncio would print its message too."""

    def escaped(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        fields = exception_fields(error) if isinstance(error, BaseException) else {}
        logging.getLogger("asyncio").error("an error reached the event loop", extra={"fields": fields})

    loop.set_exception_handler(escaped)
