"""When keys and certificates were last used, to the minute: a small file next to the keys file.

A request costs one write to a dictionary. The file is replaced at most once a minute, so a crash loses at most that
minute. The gateways of a host share it: each merges what the others wrote, and the later time wins.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Container
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger("llmserve.keys")
FLUSH_SECONDS = 60.0
FORM = "%Y-%m-%dT%H:%MZ"


def last_used_file(keys_file: Path) -> Path:
    """Path of the file."""
    return keys_file.with_name("last-used.json")


def read_last_used(path: Path) -> dict[str, datetime]:
    """Minute by id. Nothing depends on it, so an invalid file counts as empty."""
    try:
        content = json.loads(path.read_bytes())
        return {
            str(number): datetime.strptime(at, FORM).replace(tzinfo=UTC) for number, at in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class LastUsed:
    """A gateway's last-used times."""

    def __init__(self, path: Path) -> None:
        """Starts with the times in the file."""
        self.path = path
        self.minutes: dict[str, int] = {}
        self.unwritten = False
        self.next_flush = 0.0  # time.monotonic()
        self.take_in()

    def take_in(self) -> None:
        """Merge the file; the later time wins."""
        for number, at in read_last_used(self.path).items():
            self.minutes[number] = max(self.minutes.get(number, 0), int(at.timestamp()) // 60)

    def touch(self, number: str) -> None:
        """Note that `number` is used now."""
        minute = int(time.time()) // 60
        if self.minutes.get(number) != minute:
            self.minutes[number] = minute
            self.unwritten = True

    def flush_if_due(self, ids: Container[str]) -> None:
        """Write if there is anything new, at most once a minute."""
        if self.unwritten and time.monotonic() >= self.next_flush:
            self.flush(ids)

    def flush(self, ids: Container[str]) -> None:
        """Replace the file; all but `ids` are dropped."""
        self.next_flush = time.monotonic() + FLUSH_SECONDS
        self.take_in()
        self.minutes = {number: minute for number, minute in self.minutes.items() if number in ids}
        content = {
            number: datetime.fromtimestamp(minute * 60, UTC).strftime(FORM)
            for number, minute in sorted(self.minutes.items())
        }
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(content, file)
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            log.warning(
                f"cannot write {self.path} ({error.strerror}): until that succeeds, `keys list` shows outdated times"
            )
        else:
            self.unwritten = False
