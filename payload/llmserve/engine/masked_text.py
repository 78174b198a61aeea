"""Prevents client text from becoming a control token: `<|im_end|>` in a message must not end it.

While the chat template is rendered, each of them is replaced by a character that the request does not contain. The pieces around
them become tokens as usual; they themselves become tokens like any other text.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

FREE, LAST = 0xF0000, 0x10FFFF  # characters that Unicode leaves to private use


class MaskedText:
    """The strings of a request without control tokens. `messages` and `tools`: as given, except for these tokens."""

    def __init__(self, controls: Sequence[str], messages: Any, tools: Any) -> None:
        """`controls`: texts of control tokens."""
        longest_first = sorted(controls, key=len, reverse=True)
        self.mark: dict[str, str] = {}
        self.messages, self.tools = messages, tools
        pattern = re.compile("|".join(map(re.escape, longest_first)) or r"\Z\A.")
        texts = [*strings(messages), *strings(tools)]
        present = sorted({control for text in texts for control in pattern.findall(text)})
        if not present:
            return
        codes = {ord(character) for text in texts for character in text if ord(character) >= FREE}
        free = (chr(code) for code in range(FREE, LAST) if code not in codes)
        self.mark = dict(zip(present, free, strict=False))
        self.messages, self.tools = (
            replaced(each, lambda text: pattern.sub(lambda match: self.mark[match[0]], text))
            for each in (messages, tools)
        )

    def pieces(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The pieces of a rendered prompt, each with whether it is text that looks like a control token."""
        if not self.mark:
            yield rendered, False
            return
        control = {mark: text for text, mark in self.mark.items()}
        for piece in re.split(f"([{''.join(control)}])", rendered):
            if piece:
                yield control.get(piece, piece), piece in control


def strings(value: Any) -> Iterator[str]:
    """All strings in JSON values, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, below in value.items():
            yield name
            yield from strings(below)
    elif isinstance(value, list):
        for below in value:
            yield from strings(below)


def replaced(value: Any, change: Any) -> Any:
    """A copy of JSON values with each string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): replaced(below, change) for name, below in value.items()}
    return [replaced(below, change) for below in value] if isinstance(value, list) else value
