"""The interface between document parsers and their caller. Each document is read by a process of its own, __main__.py."""

from enum import StrEnum

FILE_BYTES = 64 << 20
MOST_PAGES = 5000
MOST_LETTERS = 8 << 20  # of a document's text
OUTPUT_BYTES = 64 << 20  # of the JSON that a parser writes; six bytes a letter at most, and the pages' quotes
MEMORY_BYTES = 1 << 30  # of address space
CPU_SECONDS = 60


class Reason(StrEnum):
    """Why no text can be read from a document, as a predicate of its name."""

    BROKEN = "is broken, or not in the format that its name says: open it in its program and save it again"
    ENCODING = "contains bytes that are invalid in its encoding: convert it to UTF-8"
    ENCRYPTED = (
        "is encrypted, or in a format of Office before 2007: save it without a password, in the newer format"
    )
    LARGE = "exceeds the size limit when unpacked: split it"
    LETTERS = f"has more than {MOST_LETTERS >> 20} Mi letters: split it"
    MEMORY = f"needs more than {MEMORY_BYTES >> 30} GiB of memory to read: split it"
    PAGES = f"has more than {MOST_PAGES} pages or sheets: split it"


class Unreadable(Exception):
    """No text can be read from the document."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason
