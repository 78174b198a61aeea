"""The connection to Redis, shared by all callers, each within its own deadline."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from edge import authority, issue, revoke
from pydantic import ValidationError
from redis_server import PASSWORD, RedisServer

from llmserve.redis_client import RedisClient, RedisUnavailable
from llmserve.settings import ClientTls, Redis

ENOUGH_MS = 5000  # on a busy machine


@asynccontextmanager
async def connected(
    address: Path | str, deadline_ms: int = ENOUGH_MS, tls: ClientTls | None = None
) -> AsyncIterator[RedisClient]:
    """A gateway's client of a socket or a URL."""
    url = f"unix://{address}" if isinstance(address, Path) else address
    client = RedisClient(Redis(url=url, user="gateway-local", deadline_ms=deadline_ms, tls=tls), PASSWORD)
    yield client
    await client.close()


def test_concurrent_callers_share_a_connection_and_get_their_own_results(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> list[list[object]]:
        async with connected(redis_server.socket) as client:
            names = [f"llm:local:link:{number}" for number in range(40)]
            await asyncio.gather(*(client.execute(("SET", name, name)) for name in names))
            with redis_server.client() as operator:
                assert [each["user"] for each in operator.client_list()].count("gateway-local") == 1
            results = (client.execute(("GET", name), ("GET", name)) for name in names)
            return list(await asyncio.gather(*results))

    answers = asyncio.run(scenario())
    wanted = [f"llm:local:link:{number}".encode() for number in range(40)]
    assert answers == [[name, name] for name in wanted]


def test_a_rejected_command_does_not_affect_other_callers(redis_server: RedisServer) -> None:
    async def scenario() -> list[object]:
        async with connected(redis_server.socket) as client:
            await client.execute(("SET", "llm:local:text", "no number"))
            refused = client.execute(
                ("GET", "llm:local:text"), ("INCRBY", "llm:local:text", 1), ("GET", "llm:local:text")
            )
            beside = client.execute(("GET", "llm:local:text"))
            return list(await asyncio.gather(refused, beside, return_exceptions=True))

    refused, beside = asyncio.run(scenario())
    assert isinstance(refused, RedisUnavailable)
    assert beside == [b"no number"]


def test_a_cancelled_caller_does_not_affect_other_callers(redis_server: RedisServer) -> None:
    async def scenario() -> list[object]:
        async with connected(redis_server.socket) as client:
            await client.execute(("SET", "llm:local:text", "mine"))
            leaving = asyncio.create_task(client.execute(("GET", "llm:local:other")))
            staying = asyncio.create_task(client.execute(("GET", "llm:local:text")))
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
            first = asyncio.create_task(client.execute(("GET", "llm:local:text")))
            await asyncio.sleep(0.2)
            second = asyncio.create_task(client.execute(("GET", "llm:local:text")))
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
            await client.execute(("GET", "llm:local:text"))
            redis_server.stop()
            redis_server.start()
            await asyncio.sleep(0.1)  # the end of the connection is noticed
            return await client.execute(("GET", "llm:local:text"))

    assert asyncio.run(scenario()) == [None]


class OtherHost(NamedTuple):
    """The Redis of another host, and the estate's authority."""

    url: str
    ca: Path
    server: Path

    def client_of(self, certificate: Path, crl: Path | None = None) -> ClientTls:
        return ClientTls(ca=self.ca, certificate=certificate, key=certificate.with_suffix(".key"), crl=crl)


@pytest.fixture(scope="module")
def other_host(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> OtherHost:
    ca = authority(tmp_path_factory.mktemp("estate"), "estate")
    server = issue(ca, "redis")
    return OtherHost(f"rediss://localhost:{redis_server.start_tls(ca, server)}", ca, server)


def test_the_redis_of_another_host_is_reached_by_mutual_tls(other_host: OtherHost) -> None:
    async def scenario() -> list[object]:
        async with connected(
            other_host.url, tls=other_host.client_of(issue(other_host.ca, "ours"))
        ) as client:
            return await client.execute(("SET", "llm:local:far", "away"), ("GET", "llm:local:far"))

    assert asyncio.run(scenario()) == [b"OK", b"away"]


def test_a_renewed_certificate_is_used_without_a_restart(other_host: OtherHost, tmp_path: Path) -> None:
    renewed, ours = issue(other_host.ca, "ours"), issue(authority(tmp_path, "foreign"), "ours")

    async def scenario() -> list[object]:
        async with connected(other_host.url, tls=other_host.client_of(ours)) as client:
            with pytest.raises(RedisUnavailable):
                await client.execute(("GET", "llm:local:text"))
            for suffix in (".pem", ".key"):
                renewed.with_suffix(suffix).replace(ours.with_suffix(suffix))
            client.rest_until = 0.0  # else it pauses
            return await client.execute(("SET", "llm:local:text", "new"), ("GET", "llm:local:text"))

    assert asyncio.run(scenario()) == [b"OK", b"new"]


def test_a_redis_whose_certificate_is_revoked_gets_no_prompt(other_host: OtherHost) -> None:
    async def scenario(lists: Path) -> None:
        tls = other_host.client_of(issue(other_host.ca, "ours"), lists)
        async with connected(other_host.url, tls=tls) as client:
            await client.execute(("SET", "llm:local:text", "prompt"))

    asyncio.run(scenario(revoke(other_host.ca)))
    with pytest.raises(RedisUnavailable):
        asyncio.run(scenario(revoke(other_host.ca, other_host.server)))


def test_a_handshake_that_takes_longer_than_the_deadline_is_used_by_a_later_call(
    other_host: OtherHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[object]:
        tls = other_host.client_of(issue(other_host.ca, "ours"))
        async with connected(other_host.url, 100, tls) as client:
            connect, arrived = client.connection.connect, asyncio.Event()

            async def slowly() -> None:
                await arrived.wait()
                await connect()

            monkeypatch.setattr(client.connection, "connect", slowly)
            with pytest.raises(RedisUnavailable):
                await client.execute(("PING",))
            arrived.set()
            assert client.connecting
            await client.connecting
            client.deadline = ENOUGH_MS / 1000
            client.rest_until = 0.0  # else it pauses
            monkeypatch.setattr(client.connection, "connect", None)  # there is no second handshake
            return await client.execute(("PING",))

    assert asyncio.run(scenario()) == [b"PONG"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://10.0.0.1:6379", "prompts in clear text"),
        ("rediss://10.0.0.1:6379", "'tls' .* belongs to rediss://"),
        ("rediss://gateway:secret@10.0.0.1:6379", "pattern"),
    ],
)
def test_an_address_that_would_leak_is_refused(url: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Redis(url=url)
