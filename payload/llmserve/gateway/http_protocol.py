"""uvicorn's HTTP protocol with a limit on request line and headers, and our error envelope for invalid HTTP.

Handlers find the client's end of the connection in `scope["peer"]`. Waiting for `http.disconnect` instead would cost
each request an extra task, whose end is an exception that only the garbage collector frees.
"""

from collections.abc import Callable, Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from llmserve.api.errors import ApiError
from llmserve.asgi import Scope

HEAD_BYTES = 64 * 1024  # request line and headers, which the parser itself does not limit
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class Peer:
    """The client's end of a connection, which has one request in progress at a time."""

    def __init__(self, protocol: "BoundedHttp | None" = None) -> None:
        self.protocol = protocol
        self.is_closed = False
        self.tell: Callable[[], None] | None = None

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Call `tell` once the client disconnects, or now if it already has."""
        self.tell = tell
        if self.is_closed:
            tell()

    def stays(self) -> None:
        """Cancel `when_gone`."""
        self.tell = None

    def leave(self) -> None:
        """The connection is closed."""
        self.is_closed, self.protocol = True, None
        if self.tell:
            self.tell()


class BoundedHttp(HttpToolsProtocol):
    in_head = False
    head_bytes = 0  # since the request began, or since the last part of its body
    read_bytes = 0  # by the last read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.peer = Peer(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.peer.leave()

    def respond(self, scope: Scope, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write a whole response with status 200, faster than ASGI's `send`, which also checks the headers. Returns False if
        nothing was written because `send` has more to do.
        """
        cycle = self.cycle
        if (
            cycle is None
            or cycle.scope is not scope  # the client has sent the next request already
            or cycle.response_started
            or cycle.disconnected
            or not cycle.keep_alive
            or scope["method"] == "HEAD"
            or self.flow.write_paused
        ):
            return False
        lines = [STATUS_LINE[200], *(b"%b: %b\r\n" % each for each in (*cycle.default_headers, *headers))]
        self.transport.write(b"".join((*lines, b"\r\n", body)))
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        cycle.on_response()
        return True

    @property
    def takes_chunks(self) -> bool:
        """Whether a chunked response has begun and the client accepts more of it."""
        chunked = self.cycle is not None and self.cycle.chunked_encoding
        return bool(chunked) and not self.flow.write_paused and not self.transport.is_closing()

    def write_chunk(self, part: bytes) -> None:
        """Write a part of the body, faster than ASGI's `send`. Call it only while `takes_chunks`."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def on_message_begin(self) -> None:
        self.in_head, self.head_bytes = True, self.read_bytes
        super().on_message_begin()
        self.scope["peer"] = self.peer  # type: ignore[typeddict-unknown-key]  # unknown to uvicorn's types

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called for trailers, too, which no route reads."""
        if self.in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes = 0
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Parse the data; reject a head, a chunk extension or trailers of more than HEAD_BYTES."""
        self.read_bytes = len(data)
        self.head_bytes += len(data)
        super().data_received(data)
        if self.head_bytes <= HEAD_BYTES or self.transport.is_closing():
            return
        if self.in_head:
            message = f"request line and headers are longer than {HEAD_BYTES} bytes: send the prompt by POST"
        else:
            message = f"trailers or a chunk's extension are longer than {HEAD_BYTES} bytes: send none"
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()  # an answer is on its way, and nothing else can be said
        else:
            self.refuse(ApiError(431, "head_too_large", message))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that it cannot parse."""
        self.refuse(ApiError(400, "invalid_http", f"{msg} Send HTTP/1.1"))

    def refuse(self, error: ApiError) -> None:
        """Respond without a handler, and close the connection."""
        body = error.body()
        start = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (
            error.status,
            REASONS[error.status],
        )
        self.transport.write(start + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        self.transport.close()
