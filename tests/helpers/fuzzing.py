"""Parsers of foreign bytes, and inputs that no writer of ours made: mutants of a corpus.

A parser passes an input if it returns or raises one of its declared refusals, within its bounds of CPU time and memory.
"""

import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

MOST_BYTES = 64 << 10  # of an input
CPU_SECONDS = 2.0  # for one input
MEMORY_BYTES = 512 << 20  # beyond what the process has at the start
MUTANTS = 200  # of a target, in `make check`
# A quoted string, a bare word or number, or a list or object without another one in it.
TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[\w.+-]+|\[[^\[\]{}]*\]|\{[^\[\]{}]*\}')
ODD = [
    *(b"null", b"true", b"0", b"-1", b"1.5", b"1e999", b"NaN", b"18446744073709551615", b"9" * 400, b"9" * 4300),
    *(b"[]", b"{}", b'""', b"[null]", b'{"a": 1}', b'"\\ud800"', b'"\\u0000"', "\"\u2028٣\"".encode(), b"\xff\xfe", b"\0"),
    *(b"0001-01-01T00:00:00+14:00", b'"9999-12-31T23:59:59-14:00"', b"2026-02-30", b"../../x", b"!!timestamp x", b"*a", b"&a "),
    *(b"[" * depth + b"]" * depth for depth in (90, 900, 30_000)),
    *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (900, 10_000)),
]  # fmt: skip


class Slow(Exception):
    """A parser took longer for one input than its bound."""


@dataclass(frozen=True)
class Target:
    """A parser. `parse` raises one of `refusals` for what it does not take; its inputs are in the folder `corpus`."""

    name: str
    parse: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    corpus: Path

    @property
    def entries(self) -> dict[str, bytes]:
        """The corpus by the names of its files."""
        return {path.name: path.read_bytes() for path in sorted(self.corpus.iterdir())}

    def run(self, data: bytes, seconds: float = CPU_SECONDS) -> None:
        """Parse one input. Raises Slow, or what the parser does not declare."""
        began = time.process_time()
        try:
            with suppress(*self.refusals):
                self.parse(data)
        except Exception as error:
            error.add_note(f"input of {self.name}: {data[:2000]!r}")
            raise
        if (spent := time.process_time() - began) > seconds:
            raise Slow(f"{self.name} took {spent:.1f} s for {len(data)} bytes, {seconds} s are the most")


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Within it, what needs MEMORY_BYTES more than now raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutant(data: bytes, entries: list[bytes], chance: Random) -> bytes:
    """An input of at most MOST_BYTES that differs from `data` in a few places."""
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        other = chance.choice(entries)
        tokens = [match.span() for match in TOKEN.finditer(data)]
        kind = chance.randrange(8)
        if tokens and kind < 4:
            start, end = chance.choice(tokens)
            part = chance.choice(ODD if kind < 3 else TOKEN.findall(other) or ODD)
        elif kind == 4:
            part = b""
        elif kind == 5:
            part = data[start:end] * chance.choice((2, 3, 100))
        elif kind == 6:
            end, part = min(start + chance.randrange(9), len(data)), chance.randbytes(chance.randrange(9))
        else:
            part = other[chance.randrange(len(other) + 1) :]
        data = (data[:start] + part + data[end:])[:MOST_BYTES]
    return data


def mutants(target: Target, number: int = MUTANTS) -> Iterator[bytes]:
    """So many mutants of the corpus, the same ones in each run."""
    chance, entries = Random(target.name), list(target.entries.values())  # noqa: S311 -- a test's inputs
    for _ in range(number):
        yield mutant(chance.choice(entries), entries, chance)
