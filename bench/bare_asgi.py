"""A minimal ASGI application: it reads a request and answers. The gateway is compared with it."""

from collections.abc import Awaitable, Callable
from typing import Any

ANSWER = b'{"choices":[{"message":{"role":"assistant","content":"' + b"x" * 250 + b'"}}]}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]


async def app(
    scope: dict[str, Any],  # noqa: ARG001 - ASGI
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """ASGI."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})
