"""Order of versions, by the rules of each ecosystem.

Debian's is defined in Debian Policy, section 5.6.12; no library with a permissive licence implements it. Tests
compare it with dpkg.
"""

import re
from collections.abc import Callable
from typing import Any

from packaging.version import Version

DEBIAN = re.compile(r"(?!.*-$)(?:(\d{1,9}):)?(\d[A-Za-z0-9.+~:-]*?)(?:-([A-Za-z0-9.+~]+))?", re.ASCII)
SEMVER = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?", re.ASCII)
PARTS = re.compile(r"(\D*)(\d*)")
MOST_CHARACTERS = 256
END, TILDE = 0, -1  # a tilde is older than the end, and the end is older than all else


class Unparsable(ValueError):
    """A text that is not a version of its ecosystem. The message quotes it."""


def debian(text: str) -> Any:
    """A key by which Debian's versions are ordered; Unparsable."""
    match = DEBIAN.fullmatch(text) if len(text) <= MOST_CHARACTERS else None
    if not match:
        raise Unparsable(f"{text[:MOST_CHARACTERS]!r} is not a Debian version")
    epoch, upstream, revision = match.groups()
    return int(epoch or 0), _parts(upstream), _parts(revision or "0")


def _parts(text: str) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Its parts without and with digits, in turn, so that tuples compare as dpkg does."""
    words = [(word, int(number or 0)) for word, number in PARTS.findall(text) if word or number]
    return (*(((*map(_weight, word), END), number) for word, number in words), ((END,), 0))


def _weight(character: str) -> int:
    if character == "~":
        return TILDE
    return ord(character) + (0 if character.isalpha() else 256)


def pypi(text: str) -> Any:
    """A key by which Python's versions are ordered (PEP 440); Unparsable."""
    try:
        return Version(text)
    except ValueError as error:
        raise Unparsable(f"{text[:MOST_CHARACTERS]!r} is not a Python version") from error


def npm(text: str) -> Any:
    """A key by which npm's versions are ordered (semver.org 2.0.0, item 11); Unparsable."""
    match = SEMVER.fullmatch(text) if len(text) <= MOST_CHARACTERS else None
    if not match:
        raise Unparsable(f"{text[:MOST_CHARACTERS]!r} is not an npm version")
    *numbers, pre = match.groups()
    words = [
        (0, int(word), "") if word.isdecimal() else (1, 0, word) for word in pre.split(".") if pre
    ] if pre else []  # fmt: skip
    return (*map(int, numbers), not words, words)


KEYS: dict[str, Callable[[str], Any]] = {"debian": debian, "pypi": pypi, "npm": npm}
