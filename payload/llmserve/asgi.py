"""ASGI's types, one request's context, and how to answer with a whole body."""

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from llmserve.access.decision import Decision
from llmserve.access.identity import Identity

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(slots=True)
class Exchange:
    """One request and its answer, as the layers and the access log see it."""

    request_id: bytes
    trace_id: bytes
    sampled: bool  # whether the caller records this trace
    started: float  # time.monotonic()
    waited: float = 0.0  # seconds for the client, a slot and the engine: what is not the gateway's own time
    cache: bytes | None = None  # hit, miss or bypass
    identity: Identity | None = None
    action: str | None = None  # as policy names it: method and route
    decision: Decision | None = None
    public: bool = False
    intended: bool = False  # its intent is in the audit record, so its outcome must follow
    transaction: str = field(
        default_factory=lambda: secrets.token_hex(8)
    )  # a client may choose its request id
    address: str | None = None  # of the client, as the edge saw it
    route: str = "other"
    model: str | None = None
    status: int = 0
    tokens: int = 0  # that the engine has spent on it
    code: str | None = None  # of the error, if there was one
    streaming: bool = False
    fields: dict[str, object] = field(default_factory=dict)  # for the access log: counts, never text
    recorded: dict[str, object] = field(
        default_factory=dict
    )  # what the audit record says of it from the first

    @property
    def traceparent(self) -> bytes:
        """For whoever is asked next: this exchange is the parent."""
        return b"00-%b-%b-0%d" % (self.trace_id, self.transaction.encode(), self.sampled)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def respond(
    send: Send,
    status: int,
    body: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
    content_type: bytes = b"application/json",
) -> None:
    """A whole answer."""
    start: Message = {
        "type": "http.response.start",
        "status": status,
        "headers": [
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            *(headers or ()),
        ],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})


def json_body(content: object) -> bytes:
    """Compact JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
