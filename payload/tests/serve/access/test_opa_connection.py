"""The client of OPA's socket, without a gateway: which connections are reused, and what is no decision."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_opa import ALLOWED, ScriptedOpa, answer

from llmserve.access.decision import PolicyUnavailable
from llmserve.access.opa import ANSWER_BYTES, OpaServer

QUERY = {"subject": "ada", "action": "GET /generate"}


@pytest.fixture
def opa(tmp_path: Path) -> Iterator[ScriptedOpa]:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    yield opa
    opa.stop()


def asked(socket: Path, steps: Callable[[OpaServer], Awaitable[object]], deadline_ms: int = 30_000) -> Any:
    """What the steps return."""

    async def scenario() -> object:
        engine = OpaServer(socket, deadline_ms)
        try:
            return await steps(engine)
        finally:
            engine.close()

    return asyncio.run(scenario())


def trouble(socket: Path, deadline_ms: int = 30_000) -> str:
    """Why there is no decision."""
    with pytest.raises(PolicyUnavailable) as caught:
        asked(socket, lambda engine: engine.evaluate(QUERY), deadline_ms)
    return str(caught.value)


async def played(
    reply: Callable[[bytes], bytes], socket: Path, number: int = 1, hang_up: bool = False
) -> tuple[list[object], int]:
    """Answers or errors of so many questions, one after the other, and the number of connections.

    `reply`: the bytes for a request; after them the server may hang up.
    """
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            writer.write(reply(head + await reader.readexactly(size)))
            if hang_up:
                break
        writer.close()

    found: list[object] = []
    async with await asyncio.start_unix_server(serve, socket):
        engine = OpaServer(socket, 30_000)
        for _ in range(number):
            found += await asyncio.gather(engine.evaluate(QUERY), return_exceptions=True)
        engine.close()
    return found, connections


def whole(body: bytes = b'{"result": 5}', more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(body), more, body)


def test_the_query_is_posted_as_json_to_the_decision(tmp_path: Path) -> None:
    seen: list[bytes] = []

    def reply(request: bytes) -> bytes:
        seen.append(request)
        return whole()

    assert asyncio.run(played(reply, tmp_path / "s")) == ([5], 1)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/data/llm/authz/decision HTTP/1.1",
        b"host: upstream",
        b"accept-encoding: identity",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
    ]
    assert body == b'{"input":{"subject":"ada","action":"GET /generate"}}'


def test_a_connection_is_reused_and_as_many_are_opened_as_are_needed_at_once(opa: ScriptedOpa) -> None:
    async def steps(engine: OpaServer) -> int:
        for _ in range(3):
            assert await engine.evaluate(QUERY) == ALLOWED
        assert (opa.server.connections, len(engine.http.idle)) == (1, 1)
        opa.server.delay = 0.3
        await asyncio.gather(*(engine.evaluate(QUERY) for _ in range(4)))
        idle = list(engine.http.idle)
        assert len(idle) == 4
        engine.close()
        assert not engine.http.idle
        assert all(each.transport.is_closing() for each in idle)
        return opa.server.connections

    assert asked(opa.socket, steps) == 4


def test_a_connection_that_opa_closed_meanwhile_is_replaced(opa: ScriptedOpa) -> None:
    async def steps(engine: OpaServer) -> None:
        await engine.evaluate(QUERY)
        opa.server.hang_up = True
        with pytest.raises(PolicyUnavailable, match="EOFError"):
            await engine.evaluate(QUERY)
        assert (opa.server.connections, len(opa.server.questions), engine.http.idle) == (2, 3, {})
        opa.server.hang_up = False
        await engine.evaluate(QUERY)
        [connection] = engine.http.idle
        connection.transport.abort()
        assert await engine.evaluate(QUERY) == ALLOWED
        assert connection not in engine.http.idle

    asked(opa.socket, steps)


def test_a_response_that_ends_the_connection_is_used_and_the_connection_is_not(tmp_path: Path) -> None:
    found = asyncio.run(played(lambda _: whole(more=b"connection: close\r\n"), tmp_path / "s", 2))
    assert found == ([5, 5], 2)


def test_a_response_in_pieces_and_one_without_a_length_are_read_to_their_end(tmp_path: Path) -> None:
    chunked = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{"re\r\n9\r\nsult": 5}\r\n0\r\n\r\n'
    assert asyncio.run(played(lambda _: chunked, tmp_path / "s", 2)) == ([5, 5], 1)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"", "EOFError"),
        (b"no http\r\n\r\n", "HttpParser"),
        (whole()[:-3], "EOFError"),
        (whole(b"[]"), "200 without a result"),
        (whole(b'{"result"'), "200 without a result"),
        (whole(b"{}"), "200 without a result"),
        (whole(b"[" * 100_000), "200 without a result"),
        (whole().replace(b"200 OK", b"500 Oh"), "returned 500"),
    ],
)
def test_a_broken_response_is_no_decision(tmp_path: Path, reply: bytes, said: str) -> None:
    [error], _ = asyncio.run(played(lambda _: reply, tmp_path / "s", hang_up=True))
    assert isinstance(error, PolicyUnavailable)
    assert said in str(error)


def test_an_answer_of_exactly_the_limit_is_read_and_one_byte_more_is_not(opa: ScriptedOpa) -> None:
    frame = len(b'{"result": ""}')
    for more, allowed in (0, True), (1, False):
        text = "x" * (ANSWER_BYTES - frame + more)
        opa.server.reply = 200, b'{"result": "%b"}' % text.encode()
        if allowed:
            assert asked(opa.socket, lambda engine: engine.evaluate(QUERY)) == text
        else:
            assert trouble(opa.socket) == f"the policy engine answered with more than {ANSWER_BYTES} bytes"


def test_an_answer_after_the_deadline_and_an_absent_socket_are_no_decision(
    opa: ScriptedOpa, tmp_path: Path
) -> None:
    assert trouble(tmp_path / "none.sock") == f"{tmp_path}/none.sock: FileNotFoundError"
    opa.server.reply = answer()
    opa.server.delay = 0.5
    assert trouble(opa.socket, deadline_ms=50) == "no decision within 50 ms"


def test_a_request_beyond_its_deadline_ends_its_connection(opa: ScriptedOpa) -> None:
    async def steps(engine: OpaServer) -> None:
        await engine.evaluate(QUERY)
        [connection] = engine.http.idle
        opa.server.delay = 0.5
        engine.deadline = 0.05
        with pytest.raises(PolicyUnavailable, match="no decision within 50 ms"):
            await engine.evaluate(QUERY)
        assert connection.transport.is_closing()
        assert engine.http.idle == {}

    asked(opa.socket, steps)
