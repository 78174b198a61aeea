"""A power cut between two writes."""

from collections.abc import Callable
from pathlib import Path

from llmkeep import durable


def losing_power(after: int) -> Callable[[Path, bytes, int], None]:
    """`durable.write` that works so many times, and then the power is gone."""
    done: list[Path] = []

    def write(path: Path, data: bytes, mode: int) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(path)
        durable.write(path, data, mode)

    return write
