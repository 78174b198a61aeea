"""The gateway's client of an engine, on connections that a test scripts."""

import asyncio
from pathlib import Path

import uvloop

from llmserve.protocol import Beat, Generate, Hello, encode
from llmserve.upstream.admission import Place, Queue
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


def test_requests_of_other_gateways_count_as_load_of_the_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def engine(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = Hello("echo", "1", "echo", 100, 8)
            writer.write(encode(hello) + encode(Beat(False, requests=5)))
            await writer.drain()
            await asyncio.Event().wait()

        path = tmp_path / "engine.sock"
        async with await asyncio.start_unix_server(engine, path):
            client = EngineClient("echo", path, Queue(1, 1000))
            connected = asyncio.create_task(client.keep_connected())
            async with asyncio.timeout(10):
                while client.load != 5:
                    await asyncio.sleep(0.01)
            await client.ask(Generate(0, False, 1, prompt="x"), Place(1.0))
            assert (client.load, client.own_load) == (6, 1)
            connected.cancel()

    uvloop.run(scenario())
