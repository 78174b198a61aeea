"""Removes known forms of credentials and personal identifiers from a prompt that policy admits to the audit record."""

import sys

from pydantic_core import to_json

from llmcore.detectors import RECORDED, replaced

LONGEST = 4000  # characters of the redacted text


def redact(content: object) -> str:
    """A text, or lists and dicts of texts as JSON, at most LONGEST characters, with each secret replaced by its kind in brackets.

    Every string is redacted before it becomes JSON: there a line feed is the two characters `\\n`, after which a number does not
    look like the beginning of one.
    """
    if isinstance(content, str):
        return _cut(_redacted(content[: 2 * LONGEST]))
    return _cut(to_json(_Strings().redacted(content)).decode())


def scrubbed(content: object) -> object:
    """The same text, lists and dicts, whole, with each secret replaced. Takes milliseconds for some 10,000 characters."""
    return _Strings(sys.maxsize).redacted(content)


class _Strings:
    """The strings of a JSON value that can get into the record."""

    def __init__(self, remaining: int = 2 * LONGEST) -> None:
        self.remaining = remaining  # characters

    def redacted(self, value: object) -> object:
        if isinstance(value, str):
            text, self.remaining = value[: self.remaining], max(0, self.remaining - len(value))
            return _redacted(text)
        if isinstance(value, dict):
            return {
                _redacted(str(name)[:LONGEST]): self.redacted(each)
                for name, each in value.items()
                if self.remaining
            }
        if isinstance(value, list):
            return [self.redacted(each) for each in value if self.remaining]
        return value if isinstance(value, bool | None) else _redacted(str(value))


def _redacted(text: str) -> str:
    return replaced(text, RECORDED, lambda kind, _: f"[{kind}]")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "[cut]"
