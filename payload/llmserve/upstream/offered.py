"""Connections to an engine of another host, through that host's role `engine_access`: mutual TLS 1.3, with the engine's name in
ALPN, so that one port leads to all engines of the host.
"""

import asyncio

from llmserve.client_tls import ClientContext
from llmserve.protocol import LINE_LIMIT
from llmserve.settings import ClientTls, OfferedEngine
from llmserve.sockets import notice_dead_peer

CONNECT_SECONDS = 5.0
PROTOCOL = "llmkeep-engine/"  # before the engine's name, in ALPN


class OfferedAddress:
    """Where the engine is, and the credentials for it."""

    def __init__(self, engine: OfferedEngine, tls: ClientTls) -> None:
        """Nothing is read or connected yet."""
        self.engine = engine
        self.alpn = f"{PROTOCOL}{engine.name}"
        self.url = f"https://{engine.host}:{engine.port}"
        # The same for gateways of all hosts, those of its own included.
        self.identity = f"{engine.host}/{engine.name}"
        self.tls = ClientContext(tls, str(self), self.alpn)

    def __str__(self) -> str:
        return f"{self.engine.host}:{self.engine.port}/{self.engine.name}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection; raises OSError, or ConfigError if the certificates are unusable."""
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                self.engine.host, self.engine.port, ssl=self.tls.get(), limit=LINE_LIMIT
            )
        notice_dead_peer(writer.get_extra_info("socket"))
        return reader, writer
