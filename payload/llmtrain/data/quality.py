"""Quality filters, after Gopher (Rae et al. 2021) and C4 (Raffel et al. 2020), with measures that suit Chinese and English.

Conversations are only filtered by length, language and domain: their turns are short, and lists and code in an answer are not
defects.
"""

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy

from llmtrain.data.documents import Docs, Document, Rejects
from llmtrain.data.words import kinds

if TYPE_CHECKING:
    from llmtrain.data import settings

COMPRESSED = 100_000  # characters that are compressed to measure repetition


class Quality:
    """The step that drops documents that violate a rule; the first one is the reason."""

    name = "quality"

    def __init__(self, options: "settings.Quality", rejects: Rejects) -> None:
        self.options, self.rejects = options, rejects

    def broken(self, document: Document) -> Iterator[tuple[str, str]]:
        """The rules that the document violates, each with the value seen."""
        options, text = self.options, document.text
        if len(text) < options.min_letters:
            yield "short", f"{len(text)} letters, quality.min_letters is {options.min_letters}"
        if len(text) > options.max_letters:
            yield "long_text", f"{len(text)} letters, quality.max_letters is {options.max_letters}"
        language = document.metadata.get("language")
        if options.languages and language not in options.languages:
            yield "language", f"{language}, quality.languages are {', '.join(options.languages)}"
        domain = document.metadata.get("domain")
        if domain in options.drop_domains:
            yield "domain", f"{domain} is in quality.drop_domains"
        if "messages" in document.metadata:
            return
        letters = numpy.frombuffer(text.encode("utf-32-le", "replace"), numpy.uint32)
        spoken = numpy.count_nonzero(kinds()[letters])
        blanks = sum(map(text.count, " \n\t"))
        share = 1 - spoken / max(len(text) - blanks, 1)
        if share > options.max_symbols:
            yield (
                "symbols",
                f"{share:.2f} of its characters are not letters, quality.max_symbols is {options.max_symbols}",
            )
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        share = 1 - len(set(lines)) / max(len(lines), 1)
        if share > options.max_repeated_lines:
            yield (
                "repeated_lines",
                f"{share:.2f} of its lines are repetitions, quality.max_repeated_lines is {options.max_repeated_lines}",
            )
        raw = text[:COMPRESSED].encode()
        share = len(zlib.compress(raw, 1)) / max(len(raw), 1)
        if share < options.min_compressed:
            yield (
                "repetitive",
                f"compresses to {share:.2f}, quality.min_compressed is {options.min_compressed}",
            )

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        with self.rejects.of(self.name, rank) as reject:
            for document in docs:
                first = next(self.broken(document), None)
                if first is None:
                    yield document
                else:
                    reject(document, *first)
