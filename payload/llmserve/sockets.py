"""Listening sockets, and sockets of connections to other hosts."""

import os
import socket
from pathlib import Path

# A host that lost its power or its network answers nothing: the kernel gives the connection up after as many seconds, while
# it is idle (keep-alive) as well as while data wait for an acknowledgement.
DEAD_PEER_SECONDS = 5


def bind_unix(path: Path, mode: int) -> socket.socket:
    """Bind a UNIX socket at `path` with file mode `mode`, replacing a stale socket.

    Raises OSError if another process is listening there, or if `path` is not a socket.
    """
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(f"{path} is in use by another process: stop it first")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot create the socket {path}: {error.strerror}") from error
    finally:
        os.umask(before)
    path.chmod(mode)
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def bind_tcp(host: str, port: int) -> socket.socket:
    """Bind a TCP socket; port 0 picks a free one. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def notice_dead_peer(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other host has been silent for `DEAD_PEER_SECONDS`."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_PEER_SECONDS - 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
