"""Reads a document from standard input, and writes its pages, or the reason why there are none, as JSON. The argument is the
format."""

import json
import os
import sys
from importlib import import_module

from llmserve.documents.parsers import FILE_BYTES, MOST_LETTERS, MOST_PAGES, Reason, Unreadable
from llmserve.documents.parsers.confinement import confine

PARSERS = {"docx": "word", "html": "web", "pdf": "pdf", "xlsx": "sheet"}
UNUSED = ("numpy", "PIL", "lxml", "defusedxml")  # openpyxl would load them, for other than text


def answer(parser: object, data: bytes) -> dict[str, object]:
    """The output: `pages`, or `reason` by its name."""
    pages: list[str] = []
    letters = 0
    try:
        for page in parser.pages(data):  # type: ignore[attr-defined]
            # A lone surrogate is no text.
            pages.append(page.encode("utf-8", "ignore").decode())
            letters += len(page)
            if letters > MOST_LETTERS:
                raise Unreadable(Reason.LETTERS)
            if len(pages) > MOST_PAGES:
                raise Unreadable(Reason.PAGES)
    except Unreadable as error:
        return {"reason": error.reason.name}
    except (MemoryError, RecursionError):
        return {"reason": Reason.MEMORY.name}
    return {"pages": pages}


def main() -> None:
    for name in UNUSED:
        sys.modules[name] = None  # type: ignore[assignment]
    parser = import_module(f"llmserve.documents.parsers.{PARSERS[sys.argv[1]]}")
    with open(0, "rb", closefd=False) as document:
        data = document.read(FILE_BYTES + 1)
    confine()
    try:
        written = json.dumps(answer(parser, data), ensure_ascii=False).encode()
    except Exception:  # a parser's defect is the document's: its caller must not see more than the reason
        written = json.dumps({"reason": Reason.BROKEN.name}).encode()
    with open(1, "wb", closefd=False) as output:
        output.write(written)
        output.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
