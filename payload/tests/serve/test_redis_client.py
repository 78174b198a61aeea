"""The connection to Redis, shared by all callers, each within its own deadline."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis_server import PASSWORD, RedisServer

from llmserve.redis_client import RedisClient, RedisUnavailable
from llmserve.settings import Redis

ENOUGH_MS = 5000  # on a busy machine


@asynccontextmanager
async def connected(socket: Path, deadline_ms: int = ENOUGH_MS) -> AsyncIterator[RedisClient]:
    """A gateway's client."""
    client = RedisClient(Redis(url=f"unix://{socket}", user="gateway", deadline_ms=deadline_ms), PASSWORD)
    yield client
    await client.close()


def test_concurrent_callers_share_a_connection_and_get_their_own_results(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> list[list[object]]:
        async with connected(redis_server.socket) as client:
            names = [f"llm:link:{number}" for number in range(40)]
            await asyncio.gather(*(client.execute(("SET", name, name)) for name in names))
            with redis_server.client() as operator:
                assert [each["user"] for each in operator.client_list()].count("gateway") == 1
            results = (client.execute(("GET", name), ("GET", name)) for name in names)
            return list(await asyncio.gather(*results))

    answers = asyncio.run(scenario())
    wanted = [f"llm:link:{number}".encode() for number in range(40)]
    assert answers == [[name, name] for name in wanted]


def test_a_rejected_command_does_not_affect_other_callers(redis_server: RedisServer) -> None:
    async def scenario() -> list[object]:
        async with connected(redis_server.socket) as client:
            await client.execute(("SET", "llm:text", "no number"))
            refused = client.execute(("GET", "llm:text"), ("INCRBY", "llm:text", 1), ("GET", "llm:text"))
            beside = client.execute(("GET", "llm:text"))
            return list(await asyncio.gather(refused, beside, return_exceptions=True))

    refused, beside = asyncio.run(scenario())
    assert isinstance(refused, RedisUnavailable)
    assert beside == [b"no number"]


def test_a_cancelled_caller_does_not_affect_other_callers(redis_server: RedisServer) -> None:
    async def scenario() -> list[object]:
        async with connected(redis_server.socket) as client:
            await client.execute(("SET", "llm:text", "mine"))
            leaving = asyncio.create_task(client.execute(("GET", "llm:other")))
            staying = asyncio.create_task(client.execute(("GET", "llm:text")))
            while client.waiting or not client.asking:  # until both are sent
                await asyncio.sleep(0)
            leaving.cancel()
            return await staying

    assert asyncio.run(scenario()) == [b"mine"]


def test_a_caller_behind_a_slow_result_waits_no_longer_than_its_deadline(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with connected(path, deadline_ms=1000) as client:
            first = asyncio.create_task(client.execute(("GET", "llm:text")))
            await asyncio.sleep(0.2)
            second = asyncio.create_task(client.execute(("GET", "llm:text")))
            with pytest.raises(RedisUnavailable):
                await first
            await asyncio.sleep(0)
            assert second.done(), "it has its own deadline of a second, and does not use all of it"
            with pytest.raises(RedisUnavailable):
                await second

    with redis_server.delayed(tmp_path / "late.sock", 5.0) as path:
        asyncio.run(scenario())


def test_a_restarted_redis_is_used_at_once(redis_server: RedisServer) -> None:
    async def scenario() -> list[object]:
        async with connected(redis_server.socket) as client:
            await client.execute(("GET", "llm:text"))
            redis_server.stop()
            redis_server.start()
            await asyncio.sleep(0.1)  # the end of the connection is noticed
            return await client.execute(("GET", "llm:text"))

    assert asyncio.run(scenario()) == [None]
