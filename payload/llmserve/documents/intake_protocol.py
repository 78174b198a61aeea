"""What gateways and the unit that takes documents in say to each other, a JSON object a line over a UNIX socket.

A gateway sends an Order. Where it adds a document, the unit grants a place by the outcome `go`, and then reads `size` bytes. Each
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
    """What a caller wants done, of whom the gateway has verified identity and tenant, and for whom the policy has said yes.

    `transaction` and `decision`: the ids by which the record has the request. `name` and `size`: of the file to add;
    `document`: the id to remove.
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
    """A document of a collection. `status`: `ready` is in the index, `waiting` will be, `failed` is not, for `reason`."""

    id: str
    name: str
    status: Literal["ready", "waiting", "failed"]
    passages: int = 0
    revision: str = ""
    by: str = ""
    reason: str = ""


class Outcome(Frame):
    """How an order ended, or `go`. `accepted`: it goes on, and the list will show how it ended."""

    status: Literal[
        "go", "added", "replaced", "unchanged", "accepted", "removed", "listed",
        "unreadable", "missing", "busy", "failed",
    ]  # fmt: skip
    reason: str = ""
    documents: tuple[Row, ...] = ()


def name_fault(name: str) -> str:
    """Why this is no name of a document, as a predicate; empty where it is one."""
    if not name or name != name.strip() or name in {".", ".."}:
        return "is empty, or begins or ends with a blank, or is a folder's: give the file's name"
    if len(name.encode(errors="replace")) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes: shorten it"
    if "/" in name or "\\" in name:
        return "has a path: give the file's name alone"
    if any(unicodedata.category(letter).startswith("C") for letter in name):
        return "has a control or format character: rename the file"
    return ""
