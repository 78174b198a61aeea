"""The sd_notify protocol, see sd_notify(3)."""

import os
import socket


def notify(state: str) -> None:
    """Send `state`, such as "READY=1", to the service manager; without one this does nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagram:
        datagram.connect(address)
        datagram.sendall(state.encode())


def watchdog_seconds() -> float | None:
    """Seconds without "WATCHDOG=1" after which the service manager kills this process; None if it never does."""
    asked_for = os.environ.get("WATCHDOG_PID")
    if asked_for and asked_for != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None
