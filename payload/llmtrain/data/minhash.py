"""MinHash (Broder 1997): the share of equal minima of two documents estimates the Jaccard similarity of their shingles."""

from functools import lru_cache

import numpy
from numpy.typing import NDArray

from llmtrain.data.documents import Document
from llmtrain.data.duplicates import Keys, exact_key
from llmtrain.data.settings import Near
from llmtrain.data.words import MULTIPLIER, mixed, runs_of, words_of

BLOCK = 2048  # shingles at a time, so that their hashes fit the cache of a core
Minima = NDArray[numpy.uint32]


@lru_cache(1)
def permutations(count: int, seed: int) -> tuple[Minima, Minima, Minima]:
    """Odd factors (so that each permutation is a bijection), summands, and a buffer."""
    random = numpy.random.Generator(numpy.random.PCG64(seed))
    factors = random.integers(0, 2**31, (count, 1), numpy.uint32) * numpy.uint32(2) + numpy.uint32(1)
    summands = random.integers(0, 2**32, (count, 1), numpy.uint32)
    return factors, summands, numpy.empty((count, BLOCK), numpy.uint32)


def minima_of(text: str, options: Near) -> Minima:
    """The smallest hash of the text's shingles under each permutation; shape (bands * rows,), or empty if it has no word."""
    words = words_of(text)
    # A text shorter than a shingle counts as one shingle.
    shingles = runs_of(words, min(options.words, len(words))) if len(words) else words
    if not len(shingles):
        return numpy.empty(0, numpy.uint32)
    short = (shingles >> numpy.uint64(32)).astype(numpy.uint32)
    factors, summands, room = permutations(options.bands * options.rows, options.seed)
    least = numpy.full(len(factors), 2**32 - 1, numpy.uint32)
    for start in range(0, len(short), BLOCK):
        block = short[start : start + BLOCK]
        # Contiguous for any length, so that the minimum runs along memory.
        hashes = room.ravel()[: len(factors) * len(block)].reshape(len(factors), len(block))
        numpy.multiply(factors, block, out=hashes)
        hashes += summands
        numpy.minimum(least, hashes.min(axis=1), out=least)
    return least


def near_keys(options: Near, document: Document) -> Keys:
    """A key per band, the hash of its minima. A document without words matches only exact duplicates."""
    least = minima_of(document.text, options)
    if not len(least):
        return numpy.repeat(exact_key(document), options.bands)
    bands = mixed(least.reshape(options.bands, options.rows).astype(numpy.uint64))
    keys = bands[:, 0]
    for row in range(1, options.rows):
        keys = keys * MULTIPLIER + bands[:, row]
    return mixed(keys)
