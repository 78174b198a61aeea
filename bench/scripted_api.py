#!/usr/bin/python3.13
"""A server of OpenAI's API in vLLM's format with fixed answers, as the backend of gateways and routers.

It listens on a port of 127.0.0.1 and keeps connections open. A stream has 100 events of one token, one each 5 ms, each written
apart.
"""

import argparse
import asyncio
import json
from typing import cast

EVENTS = 100
EVENT_SECONDS = 0.005
USAGE = {"prompt_tokens": 7, "completion_tokens": EVENTS, "total_tokens": 7 + EVENTS}
NAMED = {"id": "chatcmpl-9a1f0c3be4d24c0f8b1c7a55d1d3c0aa", "created": 1780000000, "model": "echo"}


def response(status: str, content: object) -> bytes:
    """A whole response."""
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    """A piece of a body in chunks."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: object) -> bytes:
    """A server-sent event, as a chunk."""
    return chunk(b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n")


CHOICE = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
STREAMED = {**NAMED, "object": "chat.completion.chunk"}
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = event({**STREAMED, "choices": [CHOICE]})
END = (
    event({**STREAMED, "choices": [{**CHOICE, "delta": {}, "finish_reason": "stop"}]})
    + event({**STREAMED, "choices": [], "usage": USAGE})
    + chunk(b"data: [DONE]\n\n")
    + chunk(b"")
)
MESSAGE = {"role": "assistant", "content": "x" * 250}
ANSWER = response(
    "200 OK",
    {
        **NAMED,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
        "usage": USAGE,
    },
)
MODEL = {"id": "echo", "object": "model", "owned_by": "vllm", "root": "echo", "max_model_len": 4096}
MODELS = response("200 OK", {"object": "list", "data": [MODEL]})
NO_DESCRIPTION = response("404 Not Found", {"detail": "Not Found"})
HEALTHY = response("200 OK", {})


class Api(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is received yet."""
        self.transport = cast(asyncio.Transport, transport)
        self.received = b""

    def data_received(self, data: bytes) -> None:
        """Respond to each request that is complete."""
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, rest = self.received.partition(b"\r\n\r\n")
            _, counted, length = head.lower().partition(b"content-length:")
            size = int(length.split(b"\r\n", 1)[0]) if counted else 0
            if len(rest) < size:
                return
            body, self.received = rest[:size], rest[size:]
            self.respond(head, body)

    def respond(self, head: bytes, body: bytes) -> None:
        """Answer one request."""
        if head.startswith(b"POST"):
            if json.loads(body).get("stream"):
                self.transport.write(STREAM)
                self.stream(EVENTS)
            else:
                self.transport.write(ANSWER)
        elif b" /v1/models " in head:
            self.transport.write(MODELS)
        else:
            self.transport.write(NO_DESCRIPTION if b" /openapi.json " in head else HEALTHY)

    def stream(self, events: int) -> None:
        """The rest of a stream, beginning with the next event."""
        if self.transport.is_closing():
            return
        self.transport.write(TOKEN if events else END)
        if events:
            asyncio.get_running_loop().call_later(EVENT_SECONDS, self.stream, events - 1)


async def serve(port: int) -> None:
    """Until the process ends."""
    server = await asyncio.get_running_loop().create_server(Api, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))
