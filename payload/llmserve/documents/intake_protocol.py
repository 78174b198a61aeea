"""The protocol between gateways and the unit that takes in documents: one JSON object per line over a UNIX socket.

A gateway sends an Order. If it adds a document, the unit grants it room with the outcome `go`, and then reads `size` bytes. Each
order ends with an Outcome.
"""

import unicodedata
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LINE_BYTES = 16 << 20  # a list of 10,000 documents with the longest names
NAME_BYTES = 255
BODY_SECONDS = 120.0  # for a file to arrive

Word = Annotated[str, Field(min_length=1, max_length=256)]


class Frame(BaseModel):
    """Base: exactly the listed fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Order(Frame):
    """An operation for a caller whose identity and tenant the gateway has verified, and which the policy has allowed.

    `transaction` and `decision`: the request's ids in the audit record. `name` and `size`: of the file to add; `document`: the id
    of the document to remove.
    """

    verb: Literal["add", "list", "remove"]
    tenant: Word
    collection: Word
    subject: Word
    transaction: Word
    decision: Word
    name: str = ""
    size: Annotated[int, Field(ge=0)] = 0
    document: str = ""


class Row(Frame):
    """A document of a collection. `status`: `ready` (in the index), `waiting` (will be), or `failed` (is not, because of
    `reason`)."""

    id: str
    name: str
    status: Literal["ready", "waiting", "failed"]
    passages: int = 0
    revision: str = ""
    by: str = ""
    reason: str = ""


class Outcome(Frame):
    """How an order ended, or `go`. `accepted`: it continues, and the list will show how it ended."""

    status: Literal[
        "go", "added", "replaced", "unchanged", "accepted", "removed", "listed",
        "unreadable", "missing", "busy", "failed",
    ]  # fmt: skip
    reason: str = ""
    documents: tuple[Row, ...] = ()


def name_fault(name: str) -> str:
    """Why this is not a valid document name, as a predicate; empty if it is."""
    if not name or name != name.strip() or name in {".", ".."}:
        return "is empty, or begins or ends with a space, or names a folder: send the file's name"
    if len(name.encode(errors="replace")) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes: shorten it"
    if "/" in name or "\\" in name:
        return "contains a path: send the file's name alone"
    if any(unicodedata.category(letter).startswith("C") for letter in name):
        return "contains a control or format character: rename the file"
    return ""
