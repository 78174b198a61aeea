"""The layers around every handler, outermost first: request id, body limit, authentication. Pure ASGI.

Each is a class with `__init__(app)` and `async __call__(scope, receive, send)`; they share one
`Exchange`, which stands in `scope["llm"]`.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from llmcore import logs
from llmserve.access.decision import Decision
from llmserve.access.identity import Authenticator, Identity
from llmserve.api.errors import ApiError
from llmserve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("llmserve.access")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]([0-9a-f])(-.*)?")
HEALTH = frozenset({"/livez", "/readyz", "/health", "/drainz"})  # asked every second, so not worth a line


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


def trace(given: bytes) -> tuple[bytes, bool] | None:
    """Trace id and sampled flag of a `traceparent`, or None if it is none (https://www.w3.org/TR/trace-context/)."""
    match = TRACEPARENT.fullmatch(given)
    if match is None:
        return None
    version, trace_id, parent, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more) or not trace_id.strip(b"0") or not parent.strip(b"0"):
        return None
    return trace_id, bool(int(flags, 16) & 1)


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


class RequestId:
    """Names the request, turns errors into envelopes, and writes one access line without query or bodies."""

    def __init__(self, app: App, metrics: Metrics, close: Callable[[Exchange, int], None]) -> None:
        """Outermost: nothing escapes it. `close` gets each exchange at its end, and its nanoseconds."""
        self.app = app
        self.metrics = metrics
        self.close = close

    def begin(self, scope: Scope) -> Exchange:
        """Who asks for what is not known yet, only what the caller names it."""
        given = parent = address = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given = value
            elif name == b"traceparent":
                parent = value
            elif name == b"x-forwarded-for":  # the edge sets it, and only the edge reaches this socket
                address = value
        fresh = secrets.token_hex(16).encode()
        known = given if given and REQUEST_ID.fullmatch(given) else fresh
        traced = trace(parent) if parent else None
        exchange = Exchange(known, *(traced or (fresh, False)), time.monotonic())
        if address:
            exchange.address = address[:64].decode("latin-1")
        return exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        exchange = scope["llm"] = self.begin(scope)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                overhead = time.monotonic() - exchange.started - exchange.waited
                headers = message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", exchange.request_id),
                    (b"traceparent", exchange.traceparent),
                    (b"x-llm-overhead-us", b"%d" % (overhead * 1e6)),
                ]
                if exchange.model:
                    headers.append((b"x-llm-model", exchange.model.encode()))
                if exchange.cache:
                    headers.append((b"x-llm-cache", exchange.cache))
                    self.metrics.overhead_by[exchange.cache].observe(overhead)
            await send(message)

        try:
            await self.app(scope, receive, named)
        except ApiError as error:
            exchange.code = error.code
            self.metrics.refused(error.code)
            if not exchange.status:
                await respond(named, error.status, error.body(), error.headers)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            exchange.code = "internal_error"
            log.exception(
                "a handler failed", extra={"fields": {"http.request.id": exchange.request_id.decode()}}
            )
            if exchange.status:
                raise
            refused = ApiError(
                500,
                "internal_error",
                f"the gateway failed with {type(error).__name__}: tell the operator the id "
                f"{exchange.request_id.decode()}",
            )
            await respond(named, refused.status, refused.body())
        finally:
            self.finish(scope, exchange)

    def finish(self, scope: Scope, exchange: Exchange) -> None:
        """Count, record and log."""
        nanoseconds = int((time.monotonic() - exchange.started) * 1e9)
        self.close(exchange, nanoseconds)
        self.metrics.answered(exchange.route, exchange.status)
        if exchange.route in HEALTH or not log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, object] = {
            "http.request.id": exchange.request_id.decode(),
            "trace.id": exchange.trace_id.decode(),
            "transaction.id": exchange.transaction,
            "http.request.method": scope["method"],
            "url.path": exchange.route,
            "http.response.status_code": exchange.status,
            "event.duration": nanoseconds,
        }
        if exchange.identity:
            fields["user.id"] = exchange.identity.subject
            fields["organization.id"] = exchange.identity.tenant
            fields["llmkeep.identity.kind"] = exchange.identity.kind
            fields["llmkeep.identity.id"] = exchange.identity.id
        if exchange.decision:
            fields["llmkeep.decision.rule"] = exchange.decision.rule
        if exchange.model:
            fields["llm.model"] = exchange.model
        if exchange.cache:
            fields["llm.cache"] = exchange.cache.decode()
        if exchange.code:
            fields["error.code"] = exchange.code
        logs.told(log, "answered", fields | exchange.fields)


class BodyLimit:
    """No body is longer than the limit; llmserve.gateway.http_protocol bounds what comes before it."""

    def __init__(self, app: App, limit: int) -> None:
        """`limit` in bytes."""
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        length = header(scope, b"content-length")
        if length is not None:
            if int(length) > self.limit:
                raise self.too_large(int(length))
            await self.app(scope, receive, send)  # which the parser lets nobody exceed
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.limit:
                    raise self.too_large(seen)
            return message

        await self.app(scope, counted, send)

    def too_large(self, seen: int) -> ApiError:
        """413."""
        return ApiError(
            413,
            "body_too_large",
            f"the body has {seen} bytes or more, {self.limit} are allowed: send less",
            headers=[(b"connection", b"close")],
        )


class Authentication:
    """Every path needs an identity but the public ones; unknown paths do too."""

    def __init__(self, app: App, authenticator: Authenticator, public: frozenset[str]) -> None:
        """`public` comes out of the routing table."""
        self.app = app
        self.authenticator = authenticator
        self.public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["path"] in self.public:
            scope["llm"].public = True
        else:
            scope["llm"].identity = self.authenticator.identify(scope["headers"])
        await self.app(scope, receive, send)


def json_body(content: object) -> bytes:
    """Compact JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
