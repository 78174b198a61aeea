"""The cleaning rules by name."""

import re
from typing import NamedTuple

# Chinese characters and punctuation: whitespace between two of them has no meaning.
HAN = r"\u3001-\u301f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff20\U00020000-\U0003134f"
# Whitespace other than space and tab.
RARE = "\xa0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
BLANK = rf" \t{RARE}"


class Rule(NamedTuple):
    """Replaces `pattern` by `replace`. A text with none of `needs` cannot match, so the pattern is not tried."""

    pattern: re.Pattern[str]
    replace: str
    needs: tuple[str, ...] = ()


CLEANING: dict[str, list[Rule]] = {
    "newlines": [
        Rule(re.compile(r"\r\n?|[\u2028\u2029\x85]"), "\n", ("\r", "\u2028", "\u2029", "\x85")),
    ],
    "control": [
        Rule(re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f]+"), ""),
    ],
    # Byte order marks, soft hyphens, zero-width spaces. Joiners stay: Persian and emoji need them.
    "invisible": [
        Rule(re.compile(r"[\xad\u200b\u2060\ufeff]+"), "", ("\xad", "\u200b", "\u2060", "\ufeff")),
    ],
    # Not \\b: a Chinese character before a URL is a word character to Python.
    "urls": [
        Rule(re.compile(rf"(?<![A-Za-z0-9])(?:https?|ftp)://[^\s<>\"'{HAN}]+", re.IGNORECASE), "", ("://",)),
        Rule(
            re.compile(rf"(?<![A-Za-z0-9])www\.[^\s<>\"'{HAN}]+", re.IGNORECASE), "", ("www.", "WWW.", "Www.")
        ),
    ],
    # Collapses whitespace inside a line and removes it at the end. At the start it stays: it indents code.
    "whitespace": [
        Rule(re.compile(rf"[{BLANK}]+$", re.MULTILINE), "", (" \n", "\t\n", *RARE)),
        Rule(re.compile(rf"(?<=\S)(?:[{BLANK}]{{2,}}|[{RARE}])"), " ", ("  ", "\t", *RARE)),
    ],
    "blank_lines": [
        Rule(re.compile(r"\n{3,}"), "\n\n", ("\n\n\n",)),
    ],
    "html_tags": [
        Rule(re.compile(r"</?[a-zA-Z][^<>]{0,2000}>"), "", ("<",)),
    ],
    "chinese_blanks": [
        Rule(re.compile(rf"(?<=[{HAN}])[{BLANK}]+(?=[{HAN}])"), ""),
    ],
    "repeated_punctuation": [
        Rule(re.compile(r"([!?！？。，,~～*=#_-])\1{5,}"), r"\1\1\1"),
    ],
}


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern from the configuration; raises ValueError if it is not a valid regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
