"""Extracts text from files. Formats other than text are read by a process that can access nothing but the file
(parsers/confinement.py)."""

import os
import select
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import IO, Annotated, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmserve.documents.parsers import FILE_BYTES, MOST_LETTERS, MOST_PAGES, OUTPUT_BYTES, Reason
from llmserve.documents.passages import PAGE_BREAK

TEXT_BYTES = 16 << 20
TEXT = {".md", ".markdown", ".txt", ".text"}
FORMATS = {".docx": "docx", ".htm": "html", ".html": "html", ".pdf": "pdf", ".xlsx": "xlsx"}
SECONDS = 120.0  # until a parser has ended
CHUNK = 64 << 10
PARSER = (sys.executable, "-I", "-m", "llmserve.documents.parsers")


class UnreadableFile(Exception):
    """No text can be read from a file; the message names it and says why and what to do."""


class Extraction(BaseModel):
    """A parser's output: `pages`, or the name of the reason why there are none. A document may have taken over the parser."""

    model_config = ConfigDict(extra="forbid", strict=True)

    pages: Annotated[list[str], Field(max_length=MOST_PAGES)] = []
    reason: str | None = None


def suffix_of(file: Path) -> str:
    """The suffix that names its format; raises UnreadableFile if the format is not supported."""
    suffix = file.suffix.lower()
    if suffix not in TEXT | FORMATS.keys():
        raise UnreadableFile(
            f"{file} has the unsupported format '{suffix}': use one of {', '.join(sorted(TEXT | FORMATS.keys()))}"
        )
    return suffix


def text_of(file: Path) -> str:
    """The text of a file, its pages separated by page breaks; raises UnreadableFile or OSError."""
    suffix_of(file)
    # Opening a pipe without O_NONBLOCK waits for a writer.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as content:
        status = os.fstat(content.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(f"{file} is not a file: specify one")
        return text_in(file, content)


def text_in(file: Path, content: IO[bytes]) -> str:
    """The text of an open file; `file` is its name for messages. Raises UnreadableFile or OSError."""
    suffix = suffix_of(file)
    most = FILE_BYTES if suffix in FORMATS else TEXT_BYTES
    if os.fstat(content.fileno()).st_size > most:
        raise UnreadableFile(f"{file} is larger than {most >> 20} MiB: split it")
    if suffix in FORMATS:
        return PAGE_BREAK.join(pages_of(file, content.fileno(), [*PARSER, FORMATS[suffix]]))
    raw_text = content.read(most)
    try:
        return raw_text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            f"{file} is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        ) from None


def pages_of(file: Path, descriptor: int, parser: Sequence[str], seconds: float = SECONDS) -> list[str]:
    """The pages that a parser reads from the open file; raises UnreadableFile if it returns none within `seconds`."""
    # Its messages may quote the document, which belongs in no log.
    process = subprocess.Popen(
        parser, stdin=descriptor, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", env={}
    )
    try:
        with process:
            output = _output(process, cast(IO[bytes], process.stdout).fileno(), seconds)
            try:
                status = process.wait(1)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                process.kill()
    except TimeoutError:
        raise UnreadableFile(f"{file} took more than {seconds:.0f} s to read: split it") from None
    if status or output is None:
        raise UnreadableFile(
            f"{file} ended its parser ({status}), which ran out of time or memory or hit a bug: split the file, or save it again"
        )
    try:
        extraction = Extraction.model_validate_json(output)
    except ValidationError:
        raise UnreadableFile(f"{file} made its parser write invalid output: do not trust this file") from None
    if extraction.reason is not None:
        reason = Reason.__members__.get(extraction.reason, Reason.BROKEN)
        raise UnreadableFile(f"{file} {reason}")
    if sum(map(len, extraction.pages)) > MOST_LETTERS:
        raise UnreadableFile(f"{file} {Reason.LETTERS}")
    return [page.replace(PAGE_BREAK, "\n") for page in extraction.pages]


def _output(process: "subprocess.Popen[bytes]", pipe: int, seconds: float) -> bytes | None:
    """The whole output of a process, or None if it is too long; the process is then killed. Also kills it on TimeoutError."""
    output = bytearray()
    end = monotonic() + seconds
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        remaining = end - monotonic()
        if remaining <= 0 or not poll.poll(remaining * 1000):
            process.kill()
            raise TimeoutError
        chunk = os.read(pipe, CHUNK)
        if not chunk:
            return bytes(output)
        output += chunk
        if len(output) > OUTPUT_BYTES:
            process.kill()
            return None
