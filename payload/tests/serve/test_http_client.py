"""The HTTP client on real sockets: which connections it reuses, which requests it repeats, and which responses it takes."""

import asyncio
import gc
import socket
import ssl
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from edge import authority, issue, revoke
from service import PATIENCE

from llmserve import http_client
from llmserve.http_client import (
    HEAD_BYTES,
    HELD_BYTES,
    IDLE_CONNECTIONS,
    BadAnswer,
    Connection,
    HttpClient,
    Lost,
    TooLong,
)
from llmserve.settings import ClientTls

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LIMIT = 1 << 20
Reply = Callable[["Served"], bytes | Awaitable[None] | None]


class Served:
    """One request at the server. `connection` and `number` count connections, and the requests of one, from 1."""

    def __init__(self, connection: int, number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.connection = connection
        self.number = number
        self.body = body
        self.writer = writer

    def reset(self) -> None:
        """End the connection by an RST."""
        self.writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.writer.transport.abort()


class Server:
    """Replies to each request with the bytes that `reply` returns; after None it closes the connection."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[Served] = []
        self.connections = 0
        self.ended = 0  # connections that the client has ended

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection, number = self.connections, 0
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                number += 1
                lengths = [line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")]
                body = await reader.readexactly(int(lengths[0].split(b": ")[1])) if lengths else b""
                served = Served(connection, number, body, writer)
                self.requests.append(served)
                answer = self.reply(served)
                if isinstance(answer, Awaitable):
                    await answer
                elif answer is None:
                    return
                else:
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.ended += 1
        finally:
            writer.close()

    @property
    def served(self) -> list[tuple[int, int]]:
        """Connection and number of each request."""
        return [(each.connection, each.number) for each in self.requests]


@asynccontextmanager
async def serving(reply: Reply, folder: Path) -> AsyncIterator[tuple[Server, HttpClient]]:
    """A server on a UNIX socket, and a client of it."""
    server = Server(reply)
    async with await asyncio.start_unix_server(server.serve, folder / "s"):
        client = HttpClient(folder / "s", None, None)
        yield server, client
        client.close()


@asynccontextmanager
async def serving_by_tcp(
    reply: Reply, context: ssl.SSLContext | None = None, tls: ClientTls | None = None, **options: Any
) -> AsyncIterator[tuple[Server, HttpClient]]:
    """A server on a port of localhost, with TLS if it has a context, and a client of it."""
    server = Server(reply)
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = HttpClient(f"http{'s' if tls else ''}://localhost:{port}", tls, None, **options)
        yield server, client
        client.close()


async def ask(client: HttpClient, body: bytes | None = b"{}") -> bytes:
    async with client.request("POST", "/", body) as response:
        return await response.whole(LIMIT)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


def test_requests_in_succession_share_a_connection_and_those_at_once_have_one_each(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(lambda _: OK, tmp_path) as (server, client):
            for _ in range(3):
                assert await ask(client) == b"hello"
            assert server.served == [(1, 1), (1, 2), (1, 3)]
            assert await asyncio.gather(*(ask(client) for _ in range(3))) == [b"hello"] * 3
            assert server.connections == 3
            assert len(client.idle) == 3

    asyncio.run(scenario())


def test_no_more_connections_wait_idle_than_are_allowed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(lambda _: OK, tmp_path) as (server, client):
            await asyncio.gather(*(ask(client) for _ in range(IDLE_CONNECTIONS + 5)))
            assert len(client.idle) == IDLE_CONNECTIONS
            await until(lambda: server.ended == 5)
            client.close()
            await until(lambda: server.ended == IDLE_CONNECTIONS + 5)

    asyncio.run(scenario())


def test_a_connection_that_has_been_idle_for_too_long_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 0.05)

    async def scenario() -> None:
        async with serving(lambda _: OK, tmp_path) as (server, client):
            await ask(client)
            await until(lambda: server.ended == 1)
            assert client.idle == {}
            await ask(client)
            assert server.served == [(1, 1), (2, 1)]

    asyncio.run(scenario())


def test_a_connection_is_used_beyond_the_idle_limit_while_it_has_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 0.3)

    async def slow(served: Served) -> None:
        await asyncio.sleep(0.5 * (served.number - 1))
        served.writer.write(OK)

    async def scenario() -> None:
        async with serving(slow, tmp_path) as (server, client):
            for _ in range(2):
                assert await ask(client) == b"hello"
            assert server.served == [(1, 1), (1, 2)]

    asyncio.run(scenario())


def test_an_old_connection_is_retired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "AGE_SECONDS", 0.2)

    async def scenario() -> None:
        async with serving(lambda _: OK, tmp_path) as (server, client):
            await ask(client)
            await asyncio.sleep(0.2)
            await ask(client)
            await ask(client)
            assert server.served == [(1, 1), (1, 2), (2, 1)]

    asyncio.run(scenario())


@pytest.mark.parametrize("reset", [False, True])
def test_a_request_whose_reused_connection_ends_before_a_byte_is_sent_once_more(reset: bool) -> None:
    async def reply(served: Served) -> None:
        if (served.connection, served.number) != (1, 2):
            served.writer.write(OK)
        elif reset:
            served.reset()
        else:
            served.writer.close()

    async def scenario() -> None:
        async with serving_by_tcp(reply) as (server, client):
            await ask(client)
            assert await ask(client, b'{"once": 1}') == b"hello"
            assert server.served == [(1, 1), (1, 2), (2, 1)]
            assert server.requests[1].body == server.requests[2].body == b'{"once": 1}'

    asyncio.run(scenario())


def test_a_request_is_sent_no_more_than_twice(tmp_path: Path) -> None:
    async def scenario() -> None:
        def reply(_: Served) -> bytes | None:
            return OK if len(server.requests) <= 3 else None

        async with serving(reply, tmp_path) as (server, client):
            await asyncio.gather(*(ask(client) for _ in range(3)))
            with pytest.raises(Lost):
                await ask(client)
            assert len(server.requests) == 5
            assert server.served[-1] == (4, 1), "the second time on a new connection"

    asyncio.run(scenario())


def test_a_request_whose_new_connection_ends_is_not_repeated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(lambda _: None, tmp_path) as (server, client):
            with pytest.raises(Lost) as lost:
                await ask(client)
            assert isinstance(lost.value.__cause__, EOFError)
            assert server.served == [(1, 1)]

    asyncio.run(scenario())


@pytest.mark.parametrize("part", [b"H", OK[:-2]])
def test_a_request_whose_response_has_begun_is_not_repeated(part: bytes) -> None:
    async def reply(served: Served) -> None:
        if served.number == 1:
            served.writer.write(OK)
            return
        served.writer.write(part)
        await asyncio.sleep(0.1)
        served.reset()

    async def scenario() -> None:
        async with serving_by_tcp(reply) as (server, client):
            await ask(client)
            with pytest.raises(Lost) as lost:
                await ask(client)
            assert isinstance(lost.value.__cause__, ConnectionResetError)
            assert server.served == [(1, 1), (1, 2)]
            assert client.idle == {}

    asyncio.run(scenario())


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\n", OK[:-2]])
def test_a_cancelled_request_ends_its_connection_at_once(tmp_path: Path, part: bytes) -> None:
    async def reply(served: Served) -> None:
        served.writer.write(part if served.number == 2 else OK)

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client):
            await ask(client)
            asking = asyncio.create_task(ask(client))
            await until(lambda: len(server.requests) == 2)
            await asyncio.sleep(0.02)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: server.ended == 1)
            assert (len(server.requests), client.idle) == (2, {})

    asyncio.run(scenario())


def test_leaving_a_request_before_the_end_of_its_response_ends_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(lambda _: CHUNKED + b"1\r\na\r\n", tmp_path) as (server, client):
            async with client.request("GET", "/") as response:
                async for piece in response.body():
                    assert piece == b"a"
                    break
            await until(lambda: server.ended == 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("version", [b"HTTP/1.0 200 OK", b"HTTP/1.1 200 OK\r\nconnection: close"])
def test_a_connection_that_the_server_will_close_is_not_reused(tmp_path: Path, version: bytes) -> None:
    async def scenario() -> None:
        async with serving(lambda _: OK.replace(b"HTTP/1.1 200 OK", version), tmp_path) as (server, client):
            assert [await ask(client), await ask(client)] == [b"hello"] * 2
            assert server.served == [(1, 1), (2, 1)]

    asyncio.run(scenario())


@pytest.mark.parametrize("late", [False, True])
def test_bytes_that_were_not_requested_end_the_connection_and_answer_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 2 * PATIENCE)
    smuggled = OK.replace(b"hello", b"false")

    async def reply(served: Served) -> None:
        served.writer.write(OK if late else OK + smuggled)
        await asyncio.sleep(0.05)
        served.writer.write(smuggled if late else b"")

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client):
            assert await ask(client) == b"hello"
            await until(lambda: server.ended == 1)
            assert client.idle == {}
            assert await ask(client) == b"hello"
            assert server.served == [(1, 1), (2, 1)]

    asyncio.run(scenario())


def test_interim_responses_are_passed_over_and_a_switch_of_protocols_is_refused(tmp_path: Path) -> None:
    interim = b"HTTP/1.1 100 Continue\r\nx-hint: 5\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"
    switch = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"

    async def scenario() -> None:
        async with serving(lambda served: interim + OK if served.number == 1 else switch, tmp_path) as (
            server,
            client,
        ):
            async with client.request("GET", "/") as response:
                assert await response.whole(LIMIT) == b"hello"
                assert (response.status, response.headers) == (200, {"content-length": "5"})
            with pytest.raises(BadAnswer, match="it did not send HTTP"):
                await ask(client)
            assert server.served == [(1, 1), (1, 2)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-x\r\n\r\n", "it did not send HTTP"),
        (CHUNKED + b"zzz\r\n", "it did not send HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * HEAD_BYTES, "its headers are longer than 65536 bytes"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, "its headers are longer than 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1048577\r\n\r\n" + b"y" * (LIMIT + 1), "longer than 1048576 bytes"),
    ],
)  # fmt: skip
def test_an_invalid_or_too_long_response_is_refused_and_not_asked_for_again(
    tmp_path: Path, answer: bytes, message: str
) -> None:
    async def scenario() -> None:
        async with serving(lambda served: OK if served.number == 1 else answer, tmp_path) as (server, client):
            await ask(client)
            with pytest.raises(BadAnswer, match=message) as refused:
                await ask(client)
            assert isinstance(refused.value, TooLong) == ("1048576" in message)
            assert client.idle == {}
            assert server.served == [(1, 1), (1, 2)]

    asyncio.run(scenario())


def test_trailers_are_no_headers(tmp_path: Path) -> None:
    async def scenario() -> None:
        trailed = CHUNKED + b"1\r\na\r\n0\r\nstatus-of-all: 5\r\n\r\n"
        async with (
            serving(lambda _: trailed, tmp_path) as (_, client),
            client.request("GET", "/") as response,
        ):
            assert await response.whole(LIMIT) == b"a"
            assert response.headers == {"transfer-encoding": "chunked"}

    asyncio.run(scenario())


def test_reading_pauses_while_the_caller_takes_nothing(tmp_path: Path) -> None:
    size = 32 * 1024 * 1024

    async def reply(served: Served) -> None:
        served.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + bytes(size))

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client), client.request("GET", "/") as response:
            await asyncio.sleep(0.2)
            waiting = server.requests[0].writer.transport.get_write_buffer_size()
            assert waiting > size - HELD_BYTES - 2**20, "the rest waits at the server"
            received = 0
            async for piece in response.body():
                received += len(piece)
                assert len(piece) <= HELD_BYTES + 2**18
            assert received == size
        async with serving(reply, tmp_path) as (_, client), client.request("GET", "/") as response:
            await asyncio.sleep(0.1)
            assert len(await response.whole(size)) == size, "reading goes on for a caller that takes all"

    asyncio.run(scenario())


def test_a_connection_whose_response_nobody_took_is_not_reused(tmp_path: Path) -> None:
    """Its reading is paused, so it would hide its end."""
    body = bytes(HELD_BYTES + 1)

    async def scenario() -> None:
        whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        async with serving(lambda _: whole, tmp_path) as (server, client):
            async with client.request("GET", "/"):
                await asyncio.sleep(0.05)
            assert client.idle == {}
            await until(lambda: server.ended == 1)

    asyncio.run(scenario())


def test_an_idle_connection_that_is_just_closing_gets_no_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(lambda _: OK, tmp_path) as (server, client):
            await ask(client)
            [connection] = client.idle
            connection.transport.abort()
            assert await ask(client) == b"hello"
            assert server.served == [(1, 1), (2, 1)]

    uvloop.run(scenario())  # the gateway's own event loop


def test_a_connection_is_reused_although_the_end_of_its_response_comes_after_the_caller_has_left(
    tmp_path: Path,
) -> None:
    async def reply(served: Served) -> None:
        served.writer.write(CHUNKED + b"1\r\na\r\n1\r\nb\r\n")
        await asyncio.sleep(0.1)
        served.writer.write(b"0\r\n\r\n")

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client):
            for _ in range(2):
                async with client.request("GET", "/") as response:
                    await response.feed(lambda piece: piece == b"b")
                assert client.idle == {}
                await until(lambda: client.idle)
            assert server.served == [(1, 1), (1, 2)]

    asyncio.run(scenario())


@pytest.mark.parametrize("more", [b"", b"1\r\nc\r\n0\r\n\r\n"])
def test_a_response_that_does_not_end_after_its_last_event_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    monkeypatch.setattr(http_client, "END_SECONDS", 2 * PATIENCE if more else 0.1)
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 2 * PATIENCE)

    async def reply(served: Served) -> None:
        served.writer.write(CHUNKED + b"1\r\nb\r\n")
        await asyncio.sleep(0.05)
        served.writer.write(more)

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client):
            async with client.request("GET", "/") as response:
                await response.feed(lambda piece: piece == b"b")
            await until(lambda: server.ended == 1)
            assert client.idle == {}

    asyncio.run(scenario())


def test_an_error_of_the_caller_while_it_takes_the_body_reaches_the_caller(tmp_path: Path) -> None:
    async def reply(served: Served) -> None:
        served.writer.write(CHUNKED)
        await asyncio.sleep(0.05)
        served.writer.write(b"1\r\na\r\n")

    def take(_: bytes) -> bool:
        raise BadAnswer("this event is no JSON")

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client):
            with pytest.raises(BadAnswer, match="no JSON"):
                async with client.request("GET", "/") as response:
                    await response.feed(take)
            await until(lambda: server.ended == 1)

    asyncio.run(scenario())


def test_a_connection_whose_server_did_not_read_the_request_is_not_reused(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)

    async def scenario() -> None:
        async with await asyncio.start_unix_server(serve, tmp_path / "s"):
            client = HttpClient(tmp_path / "s", None, None)
            assert await ask(client, bytes(16 * 1024 * 1024)) == b"hello"
            assert client.idle == {}

    asyncio.run(scenario())


def test_a_request_of_its_own_shows_the_end_of_its_connection_and_leaves_none(tmp_path: Path) -> None:
    async def reply(served: Served) -> None:
        served.writer.write(OK)
        await asyncio.sleep(0.1)
        served.writer.close()

    async def scenario() -> None:
        async with serving(reply, tmp_path) as (server, client):
            await ask(client)
            async with client.request("GET", "/", own=True) as response:
                await response.whole(LIMIT)
                async with asyncio.timeout(PATIENCE):
                    await response.connection.until_closed()
                    await response.connection.until_closed()
            assert server.served == [(1, 1), (2, 1)]
            async with client.request("GET", "/", own=True) as response:
                await response.whole(LIMIT)
            assert response.connection.transport.is_closing()
            assert response.connection not in client.idle

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CAs for servers and for clients, and a certificate of each."""
    folder = tmp_path_factory.mktemp("certificates")
    revoke(authority(folder, "servers"))
    issue(folder / "servers.pem", "server")
    issue(authority(folder, "clients"), "gateway")
    return folder


def server_context(folder: Path, alpn: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.load_verify_locations(folder / "clients.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


def client_tls(folder: Path) -> ClientTls:
    return ClientTls(
        ca=folder / "servers.pem",
        certificate=folder / "gateway.pem",
        key=folder / "gateway.key",
        crl=folder / "servers.crl",
    )


def test_a_handshake_serves_many_requests_until_a_certificate_or_revocation_list_changes(
    certificates: Path,
) -> None:
    async def scenario() -> None:
        tls = client_tls(certificates)
        hold = asyncio.Event()

        async def reply(served: Served) -> None:
            if served.body == b"held":
                await hold.wait()
            served.writer.write(OK)

        async with serving_by_tcp(reply, server_context(certificates), tls) as (server, client):
            for _ in range(2):
                await ask(client)
            client.refresh()
            await ask(client)
            assert server.connections == 1
            held = asyncio.create_task(ask(client, b"held"))
            await until(lambda: len(server.requests) == 4)
            await ask(client)
            assert len(client.idle) == 1
            revoke(certificates / "servers.pem")
            client.refresh()
            assert client.idle == {}
            hold.set()
            assert await held == b"hello"
            assert client.idle == {}, "a connection of the old context serves no other request"
            await ask(client)
            assert server.connections == 3
            [connection] = client.idle
            assert connection.context is client.context

    asyncio.run(scenario())


def test_the_protocol_of_the_client_is_the_only_one_it_offers(certificates: Path) -> None:
    async def scenario() -> None:
        protocols: list[str | None] = []

        async def reply(served: Served) -> None:
            protocols.append(served.writer.get_extra_info("ssl_object").selected_alpn_protocol())
            served.writer.write(OK)

        tls = client_tls(certificates)
        async with serving_by_tcp(reply, server_context(certificates, "llm"), tls, alpn="llm") as (_, client):
            await ask(client)
        async with serving_by_tcp(reply, server_context(certificates, "llm"), tls) as (_, client):
            await ask(client)
        async with serving_by_tcp(reply, server_context(certificates, "http/1.1"), tls, alpn="llm") as (
            _,
            client,
        ):
            await ask(client)
        assert protocols == ["llm", None, None]

    asyncio.run(scenario())


def test_a_server_with_a_certificate_for_another_host_is_refused(certificates: Path) -> None:
    async def scenario() -> None:
        tls = client_tls(certificates)
        async with serving_by_tcp(lambda _: OK, server_context(certificates), tls) as (server, client):
            client.host = "127.0.0.1"
            with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                await ask(client)
            assert server.requests == []

    asyncio.run(scenario())


def test_the_parts_of_a_connection_do_not_wait_for_the_garbage_collector(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(lambda _: OK, tmp_path) as (_, client):
            await ask(client)
            [connection] = client.idle
            observed: weakref.ref[Connection] = weakref.ref(connection)
            gc.disable()
            try:
                client.close()
                del connection
                await asyncio.sleep(0.05)
                assert observed() is None
            finally:
                gc.enable()

    asyncio.run(scenario())
