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


def watchdog_seconds() -> float | None:
    """After how long without "WATCHDOG=1" the service manager kills this process; None where it does not."""
    asked_for = os.environ.get("WATCHDOG_PID")
    if asked_for and asked_for != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None
