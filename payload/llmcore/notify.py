"""Telling systemd where a service stands (the sd_notify protocol, see sd_notify(3))."""

import os
import socket


def notify(state: str) -> None:
    """Send `state`, for instance "READY=1", to the service manager; without one this does nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagram:
        datagram.connect(address)
        datagram.sendall(state.encode())
