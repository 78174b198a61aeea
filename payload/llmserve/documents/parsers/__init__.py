"""What a parser of documents and its caller agree on. Each document is read by a process of its own, __main__.py."""

from enum import StrEnum

FILE_BYTES = 64 << 20
MOST_PAGES = 5000
MOST_LETTERS = 8 << 20  # of a document's text
OUTPUT_BYTES = 64 << 20  # of the JSON that a parser writes; six bytes a letter at most, and the pages' quotes
MEMORY_BYTES = 1 << 30  # of address space
CPU_SECONDS = 60


class Reason(StrEnum):
    """Why a document gives no text, as a predicate of its name."""

    BROKEN = "is broken, or is not in the format that its name says: open it in its program and save it again"
    ENCODING = "has bytes that its encoding does not have: convert it to UTF-8"
    ENCRYPTED = (
        "is encrypted, or in the format of Office before 2007: save it without a password, as the newer one"
    )
    LARGE = "unpacks to more than it may: divide it"
    LETTERS = f"has more than {MOST_LETTERS >> 20} Mi letters: divide it"
    MEMORY = f"needs more than {MEMORY_BYTES >> 30} GiB of memory to be read: divide it"
    PAGES = f"has more than {MOST_PAGES} pages or sheets: divide it"


class Unreadable(Exception):
    """The document gives no text."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason
