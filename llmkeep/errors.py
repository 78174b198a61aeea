"""The base class of all refusals."""


class LlmkeepError(Exception):
    """Refused, or failed. The message says what is wrong, the value seen, and the way out; the command's exit code is 1."""
