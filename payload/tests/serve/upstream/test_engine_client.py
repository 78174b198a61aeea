"""The gateway's client of an engine whose connection is ending."""

import asyncio
from pathlib import Path

import uvloop

from llmserve.protocol import Generate, Hello
from llmserve.upstream.admission import Queue
from llmserve.upstream.engine_client import EngineClient


def test_a_request_to_an_engine_that_has_just_died_is_not_an_error_of_the_gateway(tmp_path: Path) -> None:
    """Between the loss of the connection and the reader's end, requests are still sent and cancelled."""

    async def scenario() -> None:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        path = tmp_path / "engine.sock"
        async with await asyncio.start_unix_server(hang_up, path):
            client = EngineClient("echo", path, Queue(1, 1000))
            reader, client.writer = await asyncio.open_unix_connection(path)
            client.hello = Hello("echo", "1", "echo", 100, 1)
            await reader.read()
            client.writer.close()
            await client.writer.wait_closed()
            client.send(Generate(1, False, 1, prompt="x"))
            client.stop(1)

    uvloop.run(scenario())
