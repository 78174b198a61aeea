"""The port that leads into the lab."""

import asyncio
import socket

from lab.forward import FIRST_PORT, LAST_PORT, listening_socket, serve


def test_takes_the_next_port_where_one_is_taken() -> None:
    with listening_socket() as first, listening_socket() as second:
        ports = [taken.getsockname()[1] for taken in (first, second)]
        assert FIRST_PORT <= ports[0] < ports[1] <= LAST_PORT
        assert all(taken.getsockname()[0] == "127.0.0.1" for taken in (first, second))


def test_passes_on_both_ways_until_both_ends_are_done() -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    async def conversation() -> bytes:
        far = await asyncio.start_server(shout, "127.0.0.1", 0)
        listener = listening_socket()
        port = listener.getsockname()[1]
        forwarding = asyncio.create_task(serve(listener, "127.0.0.1", far.sockets[0].getsockname()[1]))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x" * 200_000)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        forwarding.cancel()
        far.close()
        return answer

    assert asyncio.run(conversation()) == b"X" * 200_000


def test_closes_where_nobody_listens() -> None:
    async def conversation() -> bytes:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # and does not listen; nobody else gets it meanwhile
            nobody = unused.getsockname()[1]
            listener = listening_socket()
            forwarding = asyncio.create_task(serve(listener, "127.0.0.1", nobody))
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
            answer = await reader.read()
        writer.close()
        forwarding.cancel()
        return answer

    assert asyncio.run(conversation()) == b""
