"""uvicorn's HTTP protocol, with a bound on the head of a request and our envelope for what is no HTTP.

A handler finds the other end of its connection in `scope["peer"]`: to wait for `http.disconnect` would take each request
a task of its own, whose end is an exception that only the garbage collector takes away.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmserve.api.errors import ApiError

HEAD_BYTES = 64 * 1024  # request line and headers; the parser itself would take any number
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class Peer:
    """The other end of a connection, of whose requests one at a time is answered."""

    def __init__(self) -> None:
        """It is there."""
        self.gone = False
        self.tell: Callable[[], None] | None = None

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Call `tell` once it has left; at once if it has."""
        self.tell = tell
        if self.gone:
            tell()

    def stays(self) -> None:
        """Nobody is to be told any more."""
        self.tell = None

    def leave(self) -> None:
        """It has left."""
        self.gone = True
        if self.tell:
            self.tell()


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    in_head = False
    head_bytes = 0

    def __init__(self, *args: Any, **named: Any) -> None:
        """As uvicorn makes it."""
        super().__init__(*args, **named)
        self.peer = Peer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or has got all that it asked for."""
        super().connection_lost(exc)
        self.peer.leave()

    def on_message_begin(self) -> None:
        """A request begins."""
        self.in_head, self.head_bytes = True, 0
        super().on_message_begin()
        self.scope["peer"] = self.peer  # type: ignore[typeddict-unknown-key]  # uvicorn does not know it

    def on_headers_complete(self) -> None:
        """Its head is over."""
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; too many before the end of its head are refused."""
        super().data_received(data)
        if self.in_head and not self.transport.is_closing():
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES:
                message = (
                    f"request line and headers are longer than {HEAD_BYTES} bytes: send the prompt by POST"
                )
                self.refuse(ApiError(431, "head_too_large", message))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to bytes that it cannot parse."""
        self.refuse(ApiError(400, "invalid_http", f"{msg} Send HTTP/1.1"))

    def refuse(self, error: ApiError) -> None:
        """Answer without a handler, and hang up."""
        body = error.body()
        start = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (
            error.status,
            REASONS[error.status],
        )
        self.transport.write(start + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        self.transport.close()
