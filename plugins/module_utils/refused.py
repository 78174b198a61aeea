"""What modules raise, and their `main` turns into a failure."""

from __future__ import annotations


class Refused(Exception):
    """Nothing was changed, or nothing more; the message says what is wrong, the value seen, and what to do."""
