"""MinHash (Broder 1997): the share of equal minima of two documents estimates how many of their shingles are the same."""

from functools import lru_cache

import numpy
from numpy.typing import NDArray

from llmtrain.data.documents import Document
from llmtrain.data.duplicates import Keys, exact_key
from llmtrain.data.settings import Near
from llmtrain.data.words import MULTIPLIER, mixed, runs_of, words_of

BLOCK = 2048  # shingles at a time, so that all their hashes fit a core's cache
Minima = NDArray[numpy.uint32]


@lru_cache(1)
def permutations(count: int, seed: int) -> tuple[Minima, Minima, Minima]:
    """Factors (odd, so that no two shingles fall together), summands, and room to work in."""
    random = numpy.random.Generator(numpy.random.PCG64(seed))
    factors = random.integers(0, 2**31, (count, 1), numpy.uint32) * numpy.uint32(2) + numpy.uint32(1)
    summands = random.integers(0, 2**32, (count, 1), numpy.uint32)
    return factors, summands, numpy.empty((count, BLOCK), numpy.uint32)


def minima_of(text: str, options: Near) -> Minima:
    """The least hash of the text's shingles under each permutation; none where it has no word. Shape (bands * rows,)."""
    words = words_of(text)
    # A text shorter than a shingle is one shingle.
    shingles = runs_of(words, min(options.words, len(words))) if len(words) else words
    if not len(shingles):
        return numpy.empty(0, numpy.uint32)
    short = (shingles >> numpy.uint64(32)).astype(numpy.uint32)
    factors, summands, room = permutations(options.bands * options.rows, options.seed)
    least = numpy.full(len(factors), 2**32 - 1, numpy.uint32)
    for start in range(0, len(short), BLOCK):
        block = short[start : start + BLOCK]
        # One stretch of memory however short the document, so that the minimum runs along it.
        hashes = room.ravel()[: len(factors) * len(block)].reshape(len(factors), len(block))
        numpy.multiply(factors, block, out=hashes)
        hashes += summands
        numpy.minimum(least, hashes.min(axis=1), out=least)
    return least


def near_keys(options: Near, document: Document) -> Keys:
    """A key for each band: the hash of its minima. A document without words is the same only as its equals."""
    least = minima_of(document.text, options)
    if not len(least):
        return numpy.repeat(exact_key(document), options.bands)
    bands = mixed(least.reshape(options.bands, options.rows).astype(numpy.uint64))
    keys = bands[:, 0]
    for row in range(1, options.rows):
        keys = keys * MULTIPLIER + bands[:, row]
    return mixed(keys)
