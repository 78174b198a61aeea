"""The base class of all refusals, and what their messages quote."""


class LlmkeepError(Exception):
    """Refused, or failed. The message says what is wrong, the value seen, and the way out; `code` is the command's exit code."""

    code = 1


def printable(text: str) -> str:
    """Text of strangers for a terminal: control characters, which could redraw it, become `?`."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
