"""The base class of all refusals, and what their messages quote."""


class LlmkeepError(Exception):
    """Refused, or failed. The message says what is wrong, the value seen, and the way out; `code` is the command's exit code."""

    code = 1


class Refused(LlmkeepError):
    """A refusal with an exit code of its own, of those that its command documents."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """Text of strangers for a terminal: control characters, which could redraw it, become `?`."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
