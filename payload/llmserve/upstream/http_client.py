"""HTTP/1.1 to a server next door: over a UNIX socket, mutual TLS 1.3, or loopback. One connection a request.

So hanging up is what cancels a request, and no request meets a connection that the other side has just closed.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

from llmcore.config import ConfigError
from llmserve.settings import ClientTls

CONNECT_SECONDS = 5.0
HEAD_BYTES = 64 * 1024
READ_BYTES = 64 * 1024


class BadAnswer(Exception):
    """The other side sent what is no answer, or too much of it; the message says which, and quotes nothing."""


class Lost(Exception):
    """The connection ended before the answer did."""


class Response:
    """An answer as it comes. The on_… methods are httptools' callbacks."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        """Nothing read yet."""
        self.reader = reader
        self.parser = HttpResponseParser(self)
        self.pieces: list[bytes] = []
        self.head_bytes = 0
        self.has_head = self.is_whole = False
        self.status = 0

    def on_headers_complete(self) -> None:
        """Status and headers are there."""
        self.status = self.parser.get_status_code()
        self.has_head = True

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        """The end."""
        self.is_whole = True

    async def feed(self) -> None:
        """Take in what has come; raises Lost or BadAnswer."""
        data = await self.reader.read(READ_BYTES)
        if not data:
            raise Lost
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            raise BadAnswer(f"it sent no HTTP ({type(error).__name__})") from None
        if not self.has_head:
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES:
                raise BadAnswer(f"its headers are longer than {HEAD_BYTES} bytes")

    async def body(self) -> AsyncIterator[bytes]:
        """The body, piece by piece; raises Lost or BadAnswer."""
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
        """All of the body, at most `limit` bytes of it; raises Lost or BadAnswer."""
        body = bytearray()
        async for data in self.body():
            body += data
            if len(body) > limit:
                raise BadAnswer(f"its answer is longer than {limit} bytes")
        return bytes(body)


class HttpClient:
    """Where a server is, and how to prove who we are to it."""

    def __init__(self, address: Path | str, tls: ClientTls | None, key: str | None) -> None:
        """A socket's path, or a URL that the settings have checked. `key` goes with each request as a bearer token."""
        self.address = address
        self.tls = tls
        self.context: ssl.SSLContext | None = None
        self.loaded: list[int] = []
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
        """Read the certificates again if they are new; raises ConfigError where they cannot be used."""
        if self.tls is None:
            return
        files = self.tls.ca, self.tls.certificate, self.tls.key
        try:
            seen = [file.stat().st_mtime_ns for file in files]
            if seen == self.loaded:
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(self.tls.ca)
            context.load_cert_chain(self.tls.certificate, self.tls.key)
        except OSError as error:
            named = ", ".join(map(str, files))
            raise ConfigError(
                f"the certificates for {self.address} cannot be used ({error.strerror}): see to {named}"
            ) from None
        self.context, self.loaded = context, seen

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection; raises OSError or TimeoutError."""
        async with asyncio.timeout(CONNECT_SECONDS):
            if isinstance(self.address, Path):
                return await asyncio.open_unix_connection(str(self.address))
            return await asyncio.open_connection(self.host, self.port, ssl=self.context)

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes | None = None, keep: bool = False
    ) -> AsyncIterator[Response]:
        """Ask. The connection is cut when the block is left, answered or not; `keep` asks the other side to hold it
        until then. Raises OSError, TimeoutError, Lost or BadAnswer.
        """
        reader, writer = await self.connect()
        try:
            end = "connection: keep-alive\r\n" if keep else "connection: close\r\n"
            if body is not None:
                end += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            writer.write(f"{method} {path} {self.head}{end}\r\n".encode() + (body or b""))
            response = Response(reader)
            while not response.has_head:
                await response.feed()
            yield response
        finally:
            writer.transport.abort()
