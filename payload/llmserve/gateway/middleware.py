"""Pure ASGI middleware around every handler, one class per concern, in the order in which `routes.build_app` nests
them.

They share one `Exchange` per request, in `scope["llm"]`.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from llmcore import logs
from llmserve.access.identity import Authenticator
from llmserve.api.errors import ApiError, unavailable
from llmserve.asgi import App, Exchange, Message, Receive, Scope, Send, header, respond
from llmserve.gateway.http_protocol import BoundedHttp
from llmserve.metrics import Metrics
from llmserve.settings import MOST_UPLOAD_BYTES

log = logging.getLogger("llmserve.access")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]([0-9a-f])(-.*)?")
# Of all requests in progress. Parsed, prompts take up to 11 times as much (docs/develop/figures.md), 704 MiB: the process stays
# below the MemoryMax of its unit, 1 GiB, however many tenants send their longest prompts.
BODIES_BYTES = 64 * 1024 * 1024
# nginx's own times for the rest of a body whose request has been answered.
DRAIN_SECONDS = 30.0
STALL_SECONDS = 5.0
HEALTH = frozenset({"/livez", "/readyz", "/health", "/drainz"})  # polled every second, so not logged


def trace(value: bytes) -> tuple[bytes, bool] | None:
    """Trace id and sampled flag of a `traceparent`, or None if it is invalid (https://www.w3.org/TR/trace-context/)."""
    match = TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, parent, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more) or not trace_id.strip(b"0") or not parent.strip(b"0"):
        return None
    return trace_id, bool(int(flags, 16) & 1)


class RequestContext:
    """Creates the request's `Exchange`, and adds its ids to the response headers."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    def begin(self, scope: Scope) -> Exchange:
        """Take request id and trace from the headers, or generate them; the identity is still unknown."""
        client_id = parent = address = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                client_id = value
            elif name == b"traceparent":
                parent = value
            elif name == b"x-forwarded-for":  # the edge sets it, and only the edge reaches this socket
                address = value
        fresh = secrets.token_hex(16).encode()
        request_id = client_id if client_id and REQUEST_ID.fullmatch(client_id) else fresh
        traced = trace(parent) if parent else None
        exchange = Exchange(request_id, *(traced or (fresh, False)), time.monotonic())
        if address:
            exchange.address = address[:64].decode("latin-1")
        return exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope["llm"] = self.begin(scope)
        pending: Message | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal pending
            if pending is not None:
                start, pending = pending, None
                client: BoundedHttp | None = scope["peer"].protocol
                if client and client.respond(scope, start["headers"], message["body"]):
                    return
                await send(start)
            elif message["type"] == "http.response.start":
                exchange.status = message["status"]
                overhead = time.monotonic() - exchange.started - exchange.waited
                headers = message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", exchange.request_id),
                    (b"traceparent", exchange.traceparent),
                    (b"x-llm-overhead-us", b"%d" % (overhead * 1e6)),
                ]
                if exchange.response_id:
                    headers.append((b"x-llm-response-id", exchange.response_id.encode()))
                if exchange.model:
                    model = exchange.assigned.model if exchange.assigned else exchange.model
                    headers.append((b"x-llm-model", model.encode()))
                if exchange.alias:
                    headers.extend(exchange.alias.headers)
                if exchange.cache:
                    headers.append((b"x-llm-cache", exchange.cache))
                    self.metrics.overhead_by[exchange.cache].observe(overhead)
                if message.get("whole") and message["status"] == 200 and "peer" in scope:
                    pending = message
                    return
            await send(message)

        await self.app(scope, receive, send_with_headers)


class AccessLog:
    """Counts and records every request when it ends, and logs one line without query or bodies."""

    def __init__(self, app: App, metrics: Metrics, close: Callable[[Exchange, int], None]) -> None:
        """`close` is called with each exchange when it ends, and its duration in nanoseconds."""
        self.app = app
        self.metrics = metrics
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            self.finish(scope, scope["llm"])

    def finish(self, scope: Scope, exchange: Exchange) -> None:
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
        logs.info(log, "answered", fields | exchange.fields)


class ErrorEnvelope:
    """Turns exceptions of a handler into OpenAI's error envelope, unless the response has begun."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reraises only exceptions that a handler raised after its response had begun, and cancellation."""
        exchange: Exchange = scope["llm"]
        try:
            await self.app(scope, receive, send)
        except ApiError as error:
            exchange.code = error.code
            self.metrics.refused(error.code)
            self.count(exchange, error.status)
            if not exchange.status:
                await respond(send, error.status, error.body(), error.headers)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            exchange.code = "internal_error"
            self.count(exchange, 500)
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
            await respond(send, refused.status, refused.body())

    def count(self, exchange: Exchange, status: int) -> None:
        """Count failures on our side by requested model; a stream that breaks has already had status 200."""
        if exchange.model and status >= 500:
            self.metrics.of(exchange.model).failed.inc()


class BodyLimit:
    """Rejects a body of more than `limit()` bytes with 413, and one beyond the BODIES_BYTES of all requests in progress
    with 503; gateway.http_protocol limits request line and headers. Bodies of paths below `streamed` are not held here, and have
    a limit of their own.
    """

    def __init__(self, app: App, limit: Callable[[], int], streamed: str, streamed_limit: int) -> None:
        self.app = app
        self.limit = limit
        self.streamed = streamed
        self.streamed_limit = streamed_limit
        self.total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(self.streamed):
            refuse_larger(int(header(scope, b"content-length") or 0), self.streamed_limit)
            await self.app(scope, receive, send)
            return
        limit = self.limit()
        refuse_larger(int(header(scope, b"content-length") or 0), limit)
        length = 0

        async def counted() -> Message:
            nonlocal length
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                length += size
                self.total += size
                refuse_larger(length, limit)
                if self.total > BODIES_BYTES:
                    reason = f"the bodies of all requests have {self.total} bytes, the limit is {BODIES_BYTES}: retry later"
                    raise unavailable("overloaded", reason, retry_after=2)
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.total -= length


def refuse_larger(size: int, limit: int) -> None:
    """Raise ApiError 413 for a body of at least `size` bytes beyond the limit."""
    if size > limit:
        message = f"the body has at least {size} bytes, the limit is {limit}: send less"
        raise ApiError(413, "body_too_large", message, headers=[(b"connection", b"close")])


class BodyDrain:
    """Delays the response to a request below `path` until its body has arrived. Reading stops after MOST_UPLOAD_BYTES,
    DRAIN_SECONDS, or STALL_SECONDS without data; the response then closes the connection.

    The edge forwards such bodies unbuffered. If a response overtakes its body, the edge ignores the next request on the client's
    connection, although it announced keep-alive, and can lose the response if the gateway closes its own connection.
    """

    def __init__(self, app: App, path: str) -> None:
        self.app = app
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(self.path):
            await self.app(scope, receive, send)
            return
        length = 0
        is_whole = False

        async def counted() -> Message:
            nonlocal length, is_whole
            message = await receive()
            length += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            return message

        async def drain() -> None:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not is_whole and length <= MOST_UPLOAD_BYTES:
                    async with asyncio.timeout(STALL_SECONDS):
                        await counted()

        async def send_after_body(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_whole:
                with suppress(TimeoutError):
                    await drain()
                if not is_whole:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, counted, send_after_body)


class Authentication:
    """Requires an identity on every path but the public ones; unknown paths are not public."""

    def __init__(self, app: App, authenticator: Authenticator, public: frozenset[str]) -> None:
        """`public`: paths of the public routes."""
        self.app = app
        self.authenticator = authenticator
        self.public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self.public:
            scope["llm"].public = True
        else:
            scope["llm"].identity = self.authenticator.identify(scope["headers"])
        await self.app(scope, receive, send)
