"""ASGI types, the context of one request, and complete responses."""

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from llmserve.access.aliases import Alias
from llmserve.access.decision import Decision
from llmserve.access.experiments import Assigned
from llmserve.access.identity import Identity

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OTHER_ROUTE = "other"  # of a request that reached none


@dataclass(slots=True)
class Exchange:
    """One request and its answer, as seen by the middleware and the access log."""

    request_id: bytes
    trace_id: bytes
    sampled: bool  # the caller's sampled flag
    started: float  # time.monotonic()
    first: float = 0.0  # time.monotonic() of the answer's first byte; 0 until then
    hurried: bool = False  # its client set a deadline that is shorter than the gateway's
    opening: str = ""  # the answer's first letters, where it has an arm
    waited: float = 0.0  # seconds spent on client, queue and engine, which are not gateway overhead
    response_id: str = ""  # by which its answer can be rated
    answer: list[str] | None = None  # pieces of the answer, where it may be kept
    cache: bytes | None = None  # hit, miss or bypass
    identity: Identity | None = None
    action: str | None = None  # as the policy names it: method and route
    decision: Decision | None = None
    public: bool = False
    intended: bool = False  # its intent is in the audit record, so an outcome must follow
    # Unlike the request id, never chosen by the client.
    transaction: str = field(default_factory=lambda: secrets.token_hex(8))
    address: str | None = None  # of the client, as seen by the edge
    route: str = OTHER_ROUTE
    model: str | None = None
    alias: Alias | None = None  # by which the client asked for the model
    assigned: Assigned | None = None  # to an arm of an experiment, which the client must not learn
    status: int = 0
    code: str | None = None  # error code, if any
    streaming: bool = False
    fields: dict[str, object] = field(default_factory=dict)  # for the access log: counts, never text
    # Fields of the audit record that intent and outcome share.
    recorded: dict[str, object] = field(default_factory=dict)

    @property
    def traceparent(self) -> bytes:
        """For downstream requests, with this exchange as the parent."""
        return b"00-%b-%b-0%d" % (self.trace_id, self.transaction.encode(), self.sampled)


def header(scope: Scope, name: bytes) -> bytes | None:
    """Value of the first header `name` (lower case), or None."""
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
    """Send a complete response."""
    start: Message = {
        "type": "http.response.start",
        "whole": True,  # so that RequestContext may wait for the body
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
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
