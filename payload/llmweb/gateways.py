"""The gateways on the page's host, reached through their sockets; one that is stopping has removed its socket."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from llmserve.api.errors import unavailable
from llmserve.http_client import HttpClient, Response


class Gateways:
    """Asked in turn."""

    def __init__(self, sockets: tuple[Path, ...]) -> None:
        self.clients = [HttpClient(socket, None, None) for socket in sockets]

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        pieces: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Response]:
        """The response once its headers have arrived; leaving the block ends the request. `pieces`: a streamed body.

        The next gateway is tried only if connecting failed: requests are never sent twice. Raises ApiError 503 if there is none,
        and what HttpClient raises.
        """
        self.clients.append(self.clients.pop(0))
        async with AsyncExitStack() as asked:
            for client in list(self.clients):
                try:
                    response = await asked.enter_async_context(
                        client.request(method, path, body, headers, own=True, pieces=pieces)
                    )
                except (FileNotFoundError, ConnectionRefusedError):
                    continue
                yield response
                return
        raise unavailable("unavailable", "no gateway answers: send it again in a few seconds", 5)
