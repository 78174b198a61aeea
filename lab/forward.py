"""A port of 127.0.0.1 that leads to a host inside the lab's namespace.

The process listens outside, then enters the namespace, so that its later connections are inside.
"""

import argparse
import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

FIRST_PORT, LAST_PORT = 8443, 8499


def listening_socket(first: int = FIRST_PORT, last: int = LAST_PORT) -> socket.socket:
    """A listening socket on the first free port of 127.0.0.1 in this range; OSError if there is none."""
    for port in range(first, last + 1):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
    raise OSError(errno.EADDRINUSE, f"ports {first} to {last} of 127.0.0.1 are all taken")


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until end of file, then shut down the other side's writing end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def serve(listener: socket.socket, address: str, port: int) -> None:
    """Forward connections to `address`:`port` until killed."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                far_reader, far_writer = await asyncio.open_connection(address, port)
        except OSError:  # a timeout is one
            writer.close()
            return
        try:
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                end.close()

    server = await asyncio.start_server(connection, sock=listener)
    async with server:
        await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Listen outside and connect inside the namespace; the chosen port is written to a file once it is listening."""
    parser = argparse.ArgumentParser(prog="python3.13 -m lab.forward", description="a port into the lab")
    parser.add_argument("--namespace", required=True, type=Path, help="file that stands for the namespace")
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--port-file", required=True, type=Path, help="where to write the port it listens on")
    options = parser.parse_args(arguments)
    listener = listening_socket()
    with options.namespace.open("rb") as handle:
        os.setns(handle.fileno(), os.CLONE_NEWNET)
    staged = options.port_file.with_suffix(".new")
    staged.write_text(f"{listener.getsockname()[1]}\n", encoding="ascii")
    staged.replace(options.port_file)
    asyncio.run(serve(listener, options.address, options.port))


if __name__ == "__main__":
    main()
