"""A file that is written and hashed at the same time, continuing after an interrupted run."""

import hashlib
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import wrap_file

from llmkeep.errors import LlmkeepError

CHUNK = 4 << 20
AHEAD = 4  # chunks that wait to be hashed


def progress(stream: BinaryIO, size: int, name: str) -> AbstractContextManager[BinaryIO]:
    """STREAM, to be read in a `with`; a terminal shows the progress towards SIZE bytes."""
    return wrap_file(
        stream,
        total=size,
        description=name,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


class TooLong(LlmkeepError):
    """A source has more bytes than it stated."""


class Resumable:
    """Write PATH, which will have SIZE bytes. Hashing runs beside writing, in a thread.

    `write`, `tell`, `seek` and `truncate` are those of a file, as huggingface_hub's `http_get` uses them. Existing
    chunks are read instead of written, so a copy continues at reading speed. Nothing is synced.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self.hash = hashlib.sha256()
        self.hashing: deque[Future[None]] = deque()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self.stream = os.fdopen(descriptor, "r+b", buffering=0)
        self.old_size = os.fstat(descriptor).st_size
        if self.old_size > size:
            self.old_size = self.stream.truncate(0)
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Resumable":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.stream.close()

    def resume(self) -> int:
        """Hash the existing bytes; returns their number, after which `write` continues."""
        while self.position < self.old_size and (chunk := self.stream.read(CHUNK)):
            self._hash(chunk)
        return self.position

    def write(self, chunk: bytes) -> int:
        if self.position + len(chunk) > self.size:
            raise TooLong(
                f"{self.path.name} has more than the {self.size} bytes that its source stated: "
                "do not use it; ask its publisher"
            )
        if not (self.position < self.old_size and self._has(chunk)):
            view = memoryview(chunk)
            while view:
                view = view[self.stream.write(view) :]
        self._hash(chunk)
        return len(chunk)

    def _has(self, chunk: bytes) -> bool:
        there = self.stream.read(len(chunk)) == chunk
        if not there:
            self.stream.seek(self.position)
        return there

    def _hash(self, chunk: bytes) -> None:
        if len(self.hashing) == AHEAD:
            self.hashing.popleft().result()
        self.hashing.append(self.pool.submit(self.hash.update, chunk))
        self.position += len(chunk)

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        """To the beginning only: a server that ignores the range sends everything again."""
        if position != 0:
            raise ValueError(f"position {position} of {self.path}: only 0 can be sought")
        self.digest()
        self.hash, self.position = hashlib.sha256(), 0
        return self.stream.seek(0)

    def truncate(self) -> int:
        self.old_size = self.position
        return self.stream.truncate(self.position)

    def digest(self) -> str:
        """Hex sha256 of all written bytes."""
        while self.hashing:
            self.hashing.popleft().result()
        return self.hash.hexdigest()
