"""Splits documents into passages that fit an embedding model, with their offsets in the document's text."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

TOKENS = 200  # of a passage, estimated; all-minilm-l6-v2 was trained on 256
WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
LETTERS_A_TOKEN = 4  # of text that is not Chinese, Japanese or Korean, where a letter is a token
# What a passage may end with, the best first: a paragraph, a line, a sentence, a word.
ENDS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?;]\s|[\u3002\uff01\uff1f\uff1b]", r"\s")]
PAGE_BREAK = "\f"
Language = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Passage:
    """`text` is the document's text from `start` to `end`, in characters; `page` counts from 1."""

    number: int
    page: int
    start: int
    end: int
    text: str

    @property
    def hash(self) -> str:
        """SHA-256 of its text in UTF-8."""
        return sha256(self.text.encode()).hexdigest()


def normalized(text: str) -> str:
    """The text in NFC, with lines ended by line feeds, without control and format characters other than line feed, tab and page
    break: invisible characters are not searched.
    """
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        letter
        for letter in lines
        if letter in "\n\t\f" or unicodedata.category(letter) not in ("Cc", "Cf", "Co", "Cs")
    )


def language(text: str) -> Language:
    """The language of a question: Chinese if at least a fifth of its letters are."""
    return "zh" if len(WIDE.findall(text)) * 5 >= len(text.strip()) > 0 else "en"


def tokens(text: str) -> int:
    """An estimate of the number of tokens."""
    wide = len(WIDE.findall(text))
    return wide + -(-(len(text) - wide) // LETTERS_A_TOKEN)


def longest(text: str, start: int, end: int, limit: int) -> int:
    """The end of the longest piece from `start` with at most `limit` tokens."""
    low, high = start + 1, min(end, start + limit * LETTERS_A_TOKEN)
    while low < high:
        middle = (low + high + 1) // 2
        if tokens(text[start:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def cut(text: str, start: int, end: int, limit: int) -> int:
    """The end of the passage from `start`: the last good place in its second half, else the limit."""
    most = longest(text, start, end, limit)
    if most == end:
        return end
    half = start + (most - start) // 2
    for pattern in ENDS:
        if places := [match.end() for match in pattern.finditer(text, half, most)]:
            return places[-1]
    return most


def passages(text: str, limit: int = TOKENS) -> Iterator[Passage]:
    """The passages of a normalized text, of at most `limit` tokens each; none crosses a page, none is blank."""
    number = offset = 0
    for page, content in enumerate(text.split(PAGE_BREAK), 1):
        end = offset + len(content)
        start = offset
        while start < end:
            stop = cut(text, start, end, limit)
            if piece := text[start:stop].strip():
                begin = start + text[start:stop].index(piece)
                yield Passage(number, page, begin, begin + len(piece), piece)
                number += 1
            start = stop
        offset = end + 1
