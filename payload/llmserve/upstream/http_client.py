"""HTTP/1.1 client for a server over a UNIX socket, mutual TLS 1.3, or loopback; one connection per request.

So closing the connection cancels the request, and no request meets a connection that the server has just closed.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

from llmserve.client_tls import ClientContext
from llmserve.settings import ClientTls

CONNECT_SECONDS = 5.0
HEAD_BYTES = 64 * 1024
READ_BYTES = 64 * 1024


class BadAnswer(Exception):
    """The server's response is invalid or too long; the message says which, and quotes nothing."""


class Lost(Exception):
    """The connection ended before the response did."""


class Response:
    """A response as it arrives. The on_… methods are callbacks of httptools."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.reader = reader
        self.parser = HttpResponseParser(self)
        self.pieces: list[bytes] = []
        self.headers: dict[str, str] = {}  # by name in lower case; the last of several
        self.head_bytes = 0
        self.has_head = self.is_whole = False
        self.status = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.has_head = True

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        self.is_whole = True

    async def feed(self) -> None:
        """Read and parse more data; raises Lost or BadAnswer."""
        data = await self.reader.read(READ_BYTES)
        if not data:
            raise Lost
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            raise BadAnswer(f"it did not send HTTP ({type(error).__name__})") from None
        if not self.has_head:
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES:
                raise BadAnswer(f"its headers are longer than {HEAD_BYTES} bytes")

    async def body(self) -> AsyncIterator[bytes]:
        """The body in pieces; raises Lost or BadAnswer."""
        while True:
            if self.pieces:
                data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
                self.pieces.clear()
                yield data
            elif self.is_whole:
                return
            else:
                await self.feed()

    async def whole(self, limit: int) -> bytes:
        """The whole body; raises Lost, or BadAnswer if it is longer than `limit` bytes."""
        body = bytearray()
        async for data in self.body():
            body += data
            if len(body) > limit:
                raise BadAnswer(f"its answer is longer than {limit} bytes")
        return bytes(body)


class HttpClient:
    """The address of a server, and the credentials for it."""

    def __init__(self, address: Path | str, tls: ClientTls | None, key: str | None) -> None:
        """`address`: path of a UNIX socket, or a validated URL. `key`: sent with each request as a bearer token."""
        self.address = address
        self.tls = ClientContext(tls, str(address)) if tls else None
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

    def refresh(self) -> None:
        """Reload the certificates if they have changed; raises ConfigError if they are unusable."""
        if self.tls:
            self.tls.get()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection; raises OSError or TimeoutError."""
        async with asyncio.timeout(CONNECT_SECONDS):
            if isinstance(self.address, Path):
                return await asyncio.open_unix_connection(str(self.address))
            context = self.tls.context if self.tls else None
            return await asyncio.open_connection(self.host, self.port, ssl=context)

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        keep: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request; yields the response once its headers are there. `headers`: further ones, without line breaks.

        Leaving the block aborts the connection, whether the response is complete or not; `keep` asks the server to
        keep it open until then. Raises OSError, TimeoutError, Lost or BadAnswer.
        """
        reader, writer = await self.connect()
        try:
            end = "connection: keep-alive\r\n" if keep else "connection: close\r\n"
            if body is not None:
                end += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            end += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
            writer.write(f"{method} {path} {self.head}{end}\r\n".encode() + (body or b""))
            response = Response(reader)
            while not response.has_head:
                await response.feed()
            yield response
        finally:
            writer.transport.abort()
