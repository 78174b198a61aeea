"""The base class of all errors, and quoting in their messages."""


class LlmkeepError(Exception):
    """A command was refused or failed.

    The message says what is wrong, the value seen and what to do; `code` is the exit code.
    """

    code = 1


class Refused(LlmkeepError):
    """A refusal with one of the exit codes that its command documents."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """Untrusted text for a terminal: control characters, which could redraw it, become `?`."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
