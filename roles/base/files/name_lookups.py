"""The NSS modules and DNS servers that name lookups use, as the findings of two checks: `lookup`, by getaddrinfo(), and `dns`,
by a program that queries DNS itself.

Runs in a network namespace to which every address is local, so nothing leaves the host and no answer is awaited.
"""

import contextlib
import ctypes
import ipaddress
import json
import os
import re
import socket
import subprocess
from pathlib import Path

NAME = "verify.invalid."  # RFC 6761: no server resolves it
LOOPBACK = "127.0.0.1"  # the server that glibc uses if none is configured
ETH_P_ALL, ETH_P_IPV6 = 0x0003, 0x86DD
INTERNET, HOST_ADDRESS = 1, 1


def enter_own_network() -> None:
    os.unshare(os.CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "route", "add", "local", "default", "dev", "lo"], check=True)
    # Fails if the kernel has no IPv6, in which case no DNS server is reached over it.
    subprocess.run(
        ["ip", "-6", "route", "add", "local", "default", "dev", "lo"], check=False, stderr=subprocess.DEVNULL
    )


def destinations(wire: socket.socket) -> set[str]:
    """Destinations of the UDP and TCP packets that WIRE received."""
    addresses: set[str] = set()
    while True:
        try:
            packet, address = wire.recvfrom(4096)
        except BlockingIOError:
            return addresses
        protocol, destination = (6, slice(24, 40)) if address[1] == ETH_P_IPV6 else (9, slice(16, 20))
        if packet[protocol] in (socket.IPPROTO_UDP, socket.IPPROTO_TCP):
            addresses.add(str(ipaddress.ip_address(packet[destination])))


def asked_by_getaddrinfo(wire: socket.socket) -> set[str]:
    """Servers, and NSS modules other than those for files and DNS, which are part of libc."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(NAME, None)
    return destinations(wire) | set(re.findall(r"libnss_\w+", Path("/proc/self/maps").read_text()))


def asked_by_res_query(wire: socket.socket) -> set[str]:
    answer = ctypes.create_string_buffer(512)
    ctypes.CDLL("libc.so.6").res_query(NAME.encode(), INTERNET, HOST_ADDRESS, answer, len(answer))
    return destinations(wire) - {LOOPBACK}


def main() -> None:
    enter_own_network()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as wire:
        wire.setblocking(False)
        asked = {"lookup": asked_by_getaddrinfo(wire), "dns": asked_by_res_query(wire)}
    findings = {
        name: {"ok": not addresses, "observed": f"asked: {', '.join(sorted(addresses)) or 'none'}"}
        for name, addresses in asked.items()
    }
    print(json.dumps({"checks": findings}))


if __name__ == "__main__":
    main()
