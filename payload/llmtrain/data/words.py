"""Hashes of words and of runs of words, vectorized in numpy, for near duplicates and decontamination.

A word is a run of letters and digits in lower case; each Chinese, Japanese or Korean character is a word. Texts that differ
only in punctuation and whitespace have the same words.
"""

from functools import lru_cache

import numpy
from numpy.typing import NDArray

Hashes = NDArray[numpy.uint64]
SIGNS = (
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3134F)
)  # fmt: skip
BLOCK = 1 << 18  # characters at a time, which bounds memory for long documents
LONGEST = 64  # characters of a word with distinct weights
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, odd


@lru_cache(1)
def kinds() -> NDArray[numpy.uint8]:
    """The kind of each code point: 0 between words, 1 in a word, 2 a word by itself; shape (0x110000,)."""
    table = numpy.fromiter((chr(each).isalnum() for each in range(0x110000)), numpy.uint8, 0x110000)
    for first, last in SIGNS:
        table[first : last + 1] *= 2
    return table


@lru_cache(1)
def weights() -> Hashes:
    """A weight per position in a word; odd, so that no bit of a character is lost."""
    random = numpy.random.Generator(numpy.random.PCG64(7))
    return random.integers(0, 2**63, LONGEST, numpy.uint64) * numpy.uint64(2) + numpy.uint64(1)


def mixed(hashes: Hashes) -> Hashes:
    """Mix hashes so that each bit depends on all: the finalizer of SplitMix64 (Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> numpy.uint64(31))


def words_of(text: str) -> Hashes:
    """The hash of each word, in order."""
    letters = numpy.frombuffer(text.lower().encode("utf-32-le", "replace"), numpy.uint32)
    hashes: list[Hashes] = [numpy.empty(0, numpy.uint64)]
    start = 0
    while start < len(letters):
        block = letters[start : start + BLOCK]
        kind = kinds()[block]
        if start + BLOCK < len(letters) and len(ends := numpy.flatnonzero(kind != 1)):
            block, kind = block[: ends[-1] + 1], kind[: ends[-1] + 1]  # split only between words
        hashes.append(_words(block, kind))
        start += len(block)
    return numpy.concatenate(hashes)


def _words(letters: NDArray[numpy.uint32], kind: NDArray[numpy.uint8]) -> Hashes:
    begins = kind == 2
    begins[1:] |= (kind[1:] == 1) & (kind[:-1] != 1)
    begins[0] |= kind[0] == 1
    starts = numpy.flatnonzero(begins)
    if not len(starts):
        return numpy.empty(0, numpy.uint64)
    lengths = numpy.diff(starts, append=len(letters))
    place = numpy.arange(starts[0], len(letters)) - numpy.repeat(starts, lengths)
    values = letters[starts[0] :].astype(numpy.uint64)
    values += numpy.uint64(1)
    values *= weights()[place % LONGEST]
    values *= kind[starts[0] :] != 0
    return mixed(numpy.add.reduceat(values, starts - starts[0]))


def runs_of(words: Hashes, size: int) -> Hashes:
    """The hash of each run of `size` words; empty if there are fewer words."""
    count = len(words) - size + 1
    if count < 1:
        return numpy.empty(0, numpy.uint64)
    hashes = words[:count].copy()
    for each in range(1, size):
        hashes *= MULTIPLIER
        hashes += words[each : each + count]
    return mixed(hashes)
