"""HTTP/1.1 client of one server, over a UNIX socket, mutual TLS 1.3, or loopback; its connections are reused.

httptools parses what a connection receives, and its callbacks hand the body to the caller's own, without a task or a buffer in
between. A connection has one request at a time: leaving a request before the end of its response aborts the connection, which
tells the server to stop working on it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from ssl import SSLContext
from typing import cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from llmserve.client_tls import ClientContext
from llmserve.settings import ClientTls
from llmserve.sockets import notice_dead_peer

CONNECT_SECONDS = 5.0
HEAD_BYTES = 64 * 1024
HELD_BYTES = 64 * 1024  # of a body that the caller does not take; beyond it, reading pauses
# uvicorn, and so vLLM, closes connections that have been idle for 5 s: one that is reused later might just be closing.
IDLE_SECONDS = 2.0
IDLE_CONNECTIONS = 32
# The handshake alone checks certificates and revocation lists, on both sides, so it has to be repeated now and then.
AGE_SECONDS = 60.0
END_SECONDS = 1.0  # for the end of a response of which the caller needs no more


class BadAnswer(Exception):
    """The server's response is invalid or too long; the message says which, without quoting it."""


class TooLong(BadAnswer):
    """The body is longer than the caller accepts."""


class Lost(Exception):
    """The connection ended before the response did; its cause is the error of the connection, or EOFError."""


class Response:
    """A response as it arrives. Once it fails, each method raises its error: Lost or BadAnswer."""

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.received = 0  # bytes of the head, or more
        self.has_head = self.is_whole = False
        self.enough = False  # the caller needs no more of the body
        self.pieces: list[bytes] = []  # of the body, not yet taken
        self.pending_bytes = 0  # bytes of the pieces
        self.take: Callable[[bytes], bool] | None = None
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers by name in lower case; the last value wins."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw_headers}

    def wake(self) -> None:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def change(self) -> None:
        """Wait for the head, a piece of the body, or the end."""
        if self.error:
            raise self.error
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter

    def fail(self, error: Exception) -> None:
        if not self.is_whole and not self.error:
            self.error = error
            self.wake()

    def receive(self, data: bytes) -> None:
        """Hand a piece of the body to the caller, or hold it."""
        if self.take:
            if self.enough:
                raise BadAnswer("its body goes on after its end")
            if self.take(data):
                self.enough = True
                self.wake()
            return
        self.pieces.append(data)
        self.pending_bytes += len(data)
        if self.pending_bytes > HELD_BYTES:
            self.connection.pause()
        self.wake()

    async def feed(self, take: Callable[[bytes], bool]) -> None:
        """Call `take` with each piece of the body as soon as it arrives, until it returns True or the body ends.

        Raises Lost or BadAnswer, and what `take` raises.
        """
        for piece in self.pieces:
            self.enough = self.enough or take(piece)
        self.pieces.clear()
        self.take = take
        self.connection.resume()
        while not self.enough and not self.is_whole:
            await self.change()

    async def body(self) -> AsyncIterator[bytes]:
        """The body in pieces; raises Lost or BadAnswer. Reading pauses while the caller does not take them."""
        while True:
            if self.pieces:
                data = b"".join(self.pieces)
                self.pieces.clear()
                self.pending_bytes = 0
                self.connection.resume()
                yield data
            elif self.is_whole:
                return
            else:
                await self.change()

    async def whole(self, limit: int) -> bytes:
        """The whole body; raises Lost, or BadAnswer: TooLong if it has more than `limit` bytes."""
        body = bytearray()

        def take(data: bytes) -> bool:
            body.extend(data)
            if len(body) > limit:
                raise TooLong(f"its answer is longer than {limit} bytes")
            return False

        await self.feed(take)
        return bytes(body)


class Connection(asyncio.Protocol):
    """One connection. The on_… methods are callbacks of httptools."""

    transport: asyncio.Transport

    def __init__(self, client: "HttpClient", context: SSLContext | None) -> None:
        self.client = client
        self.context = context
        self.parser: HttpResponseParser | None = HttpResponseParser(self)
        self.opened = time.monotonic()
        self.response: Response | None = None  # until the caller has left it
        self.timer: asyncio.TimerHandle | None = None  # aborts it, unless it is used before
        self.closed: asyncio.Future[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse the response; data that was not requested closes the connection."""
        response = self.response
        if response is None or self.parser is None:
            self.transport.abort()
            return
        if not response.has_head:
            response.received += len(data)
        try:
            self.parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if isinstance(error.__context__, Exception):  # raised by a callback
                self.fail(response, error.__context__)
            else:
                reason = BadAnswer(f"it did not send HTTP ({type(error).__name__})")
                reason.__cause__ = error
                self.fail(response, reason)
        else:
            if not response.has_head and response.received > HEAD_BYTES:
                self.fail(response, BadAnswer(f"its headers are longer than {HEAD_BYTES} bytes"))

    def fail(self, response: Response, error: Exception) -> None:
        """Fail the response, unless it is whole, and end the connection."""
        response.fail(error)
        self.transport.abort()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.idle.pop(self, None)
        self.writable.set()
        self.parser = None  # it refers to this object
        if self.timer:
            self.timer.cancel()
        if self.response:
            lost = Lost()
            lost.__cause__ = exc or EOFError()
            self.response.fail(lost)
        if self.closed and not self.closed.done():
            self.closed.set_result(None)

    async def until_closed(self) -> None:
        """Wait for the end of the connection."""
        if not self.transport.is_closing():
            self.closed = asyncio.get_running_loop().create_future()
            await self.closed

    def pause(self) -> None:
        if self.transport.is_reading():
            self.transport.pause_reading()

    def resume(self) -> None:
        if not self.transport.is_reading() and not self.transport.is_closing():
            self.transport.resume_reading()

    def on_message_begin(self) -> None:
        """Called for the response itself, after interim ones (1xx), and for what follows it."""
        if self.response is None or self.response.is_whole:
            raise BadAnswer("it sends responses that were not requested")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called for trailers, too, which no caller reads."""
        if self.response and not self.response.has_head:
            self.response.raw_headers.append((name, value))

    def on_headers_complete(self) -> None:
        response, parser = self.response, self.parser
        if response and parser:
            response.status = parser.get_status_code()
            if response.status < 200:
                response.raw_headers.clear()
                return
            response.has_head = True
            response.wake()

    def on_body(self, data: bytes) -> None:
        if self.response:
            self.response.receive(data)

    def on_message_complete(self) -> None:
        response = self.response
        if response is None or self.parser is None or not response.has_head:
            return
        response.is_whole = True
        self.reusable = self.parser.should_keep_alive()  # not available from the parser later
        if self.timer:  # the caller has left
            self.rest()
        response.wake()

    def send(self, request: bytes) -> Response:
        """Send a request, whose response is in progress until `leave`."""
        self.reusable = False
        self.response = response = Response(self)
        self.transport.write(request)
        return response

    async def send_pieces(self, response: Response, pieces: AsyncIterator[bytes]) -> None:
        """Send the body of a request as it comes, no faster than the server takes it. What they raise fails the response."""
        try:
            async for piece in pieces:
                self.transport.write(piece)
                await self.writable.wait()
        except Exception as error:
            self.fail(response, error)

    def leave(self) -> None:
        """The caller has left the response. If it took the body to its end, the rest may still come."""
        response = self.response
        if response is None or self.transport.is_closing():
            return
        if response.enough and not response.is_whole:
            self.timer = asyncio.get_running_loop().call_later(END_SECONDS, self.transport.abort)
        else:
            self.rest()

    def rest(self) -> None:
        """Wait among the idle connections, or end; a response that is not whole ends it."""
        self.response = None
        if self.timer:
            self.timer.cancel()
        fit = (
            self.reusable
            and len(self.client.idle) < IDLE_CONNECTIONS
            and self.context is self.client.context
            and time.monotonic() - self.opened < AGE_SECONDS
            and self.transport.is_reading()
            and not self.transport.get_write_buffer_size()  # the server did not want all of the request
        )
        if fit:
            self.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.transport.abort)
            self.client.idle[self] = None
        else:
            self.transport.abort()


class HttpClient:
    """The address of a server, the credentials for it, and idle connections."""

    def __init__(
        self, address: Path | str, tls: ClientTls | None, key: str | None, alpn: str | None = None
    ) -> None:
        """`address`: path of a UNIX socket, or a validated URL, whose host the server's certificate must name. `key`: sent with
        each request as a bearer token. `alpn`: the protocol to offer with TLS.
        """
        self.address = address
        self.tls = ClientContext(tls, str(address), alpn) if tls else None
        self.idle: dict[Connection, None] = {}  # in the order in which they came
        host = "upstream"
        if isinstance(address, str):
            parts = urlsplit(address)
            self.host, self.port = (
                parts.hostname or "",
                parts.port or (443 if parts.scheme == "https" else 80),
            )
            host = parts.netloc
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self.head = f"HTTP/1.1\r\nhost: {host}\r\naccept-encoding: identity\r\n{authorization}"
        self.refresh()

    @property
    def context(self) -> SSLContext | None:
        """The TLS of new connections."""
        return self.tls.context if self.tls else None

    def refresh(self) -> None:
        """Reload the certificates if they have changed, and close idle connections then; raises ConfigError if the certificates
        are unusable.
        """
        before = self.context
        if self.tls and self.tls.get() is not before:
            self.close()

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self.idle:
            connection.transport.abort()
        self.idle.clear()

    async def connect(self) -> Connection:
        """Open a connection; raises OSError or TimeoutError."""
        loop, context = asyncio.get_running_loop(), self.context
        connection = Connection(self, context)
        async with asyncio.timeout(CONNECT_SECONDS):
            if isinstance(self.address, Path):
                await loop.create_unix_connection(lambda: connection, str(self.address))
            else:
                transport, _ = await loop.create_connection(
                    lambda: connection, self.host, self.port, ssl=context
                )
                notice_dead_peer(transport.get_extra_info("socket"))
        return connection

    def idle_connection(self) -> Connection | None:
        """The one that was used last, if there is any."""
        while self.idle:
            connection, _ = self.idle.popitem()
            if connection.timer:
                connection.timer.cancel()
                connection.timer = None
            if not connection.transport.is_closing():
                return connection
        return None

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        own: bool = False,
        pieces: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request; yields the response once its headers are there. `headers`: further ones, without line breaks. `own`:
        on a new connection, which is not reused. `pieces`: a body as it comes, which needs `own` and its Content-Length in
        `headers`; the rest of it is not sent once the response is there, and what it raises is raised here.

        Leaving the block before the end of the response aborts the connection. A server may close an idle connection just as a
        request is sent, so a request whose reused connection ends before the first byte of a response is sent once more, on a
        new one. Raises OSError, TimeoutError, Lost or BadAnswer.
        """
        more = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body is not None else ""
        )
        if headers:
            more += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"{method} {path} {self.head}{more}\r\n".encode() + (body or b"")
        connection = None if own else self.idle_connection()
        if connection:
            response = connection.send(request)
            try:
                await self.head_of(response)
            except Lost:
                if response.received:
                    raise
                connection = None
        if connection is None:
            connection = await self.connect()
            response = connection.send(request)
            sending = asyncio.create_task(connection.send_pieces(response, pieces)) if pieces else None
            try:
                await self.head_of(response)
            finally:
                if sending:
                    sending.cancel()
        try:
            yield response
        finally:
            if own:
                connection.transport.abort()
            else:
                connection.leave()

    async def head_of(self, response: Response) -> None:
        """Wait for the head of a response; raises Lost or BadAnswer."""
        try:
            while not response.has_head:
                await response.change()
        except BaseException:
            response.connection.transport.abort()
            raise
