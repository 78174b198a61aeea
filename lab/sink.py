"""The sink: default gateway and resolver of every host. It answers nothing and records packets to other networks.

It answers ARP for the gateway's address, so that packets to other networks are sent, and appends one JSON line for
each IP packet whose destination is neither a host of the lab nor its seat, with the name in a DNS query.
"""

import argparse
import ipaddress
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
ALL_PROTOCOLS = 0x0003
PROTOCOLS = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 58: "icmp6"}


def arp_answer(frame: bytes, gateway: str, mac: bytes) -> bytes | None:
    """The reply to an ARP request for the gateway's address; None for any other frame."""
    if len(frame) < 42 or frame[12:14] != ARP.to_bytes(2) or frame[20:22] != b"\x00\x01":
        return None
    target = ipaddress.IPv4Address(gateway).packed
    if frame[38:42] != target:
        return None
    asker, asker_address = frame[22:28], frame[28:32]
    return asker + mac + frame[12:20] + b"\x00\x02" + mac + target + asker + asker_address


def dns_question(message: bytes) -> str | None:
    """The first name in a DNS query; None for any other payload."""
    if len(message) < 13 or message[2] & 0x80 or message[4:6] == b"\x00\x00":
        return None
    labels = []
    position = 12
    while position < len(message) and (length := message[position]):
        if length > 63:
            return None
        labels.append(message[position + 1 : position + 1 + length].decode("ascii", "backslashreplace"))
        position += 1 + length
    return ".".join(labels) or "."


def leaving(frame: bytes, inside: frozenset[str]) -> dict[str, Any] | None:
    """Description of a packet to another network; None for ARP and for packets to an address `inside`."""
    kind = int.from_bytes(frame[12:14]) if len(frame) >= 14 else 0
    packet = frame[14:]
    if kind == IPV4 and len(packet) >= 20:
        source, destination = (str(ipaddress.IPv4Address(packet[at : at + 4])) for at in (12, 16))
        protocol, payload = packet[9], packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4])]
    elif kind == IPV6 and len(packet) >= 40:
        source, destination = (str(ipaddress.IPv6Address(packet[at : at + 16])) for at in (8, 24))
        protocol, payload = packet[6], packet[40:]
    else:
        return None
    if destination in inside:
        return None
    record: dict[str, Any] = {
        "source": source,
        "destination": destination,
        "protocol": PROTOCOLS.get(protocol, str(protocol)),
        "bytes": len(packet),
    }
    if protocol in (6, 17) and len(payload) >= 8:
        record["source_port"], record["port"] = struct.unpack("!HH", payload[:4])
        if record["port"] == 53 and protocol == 17:
            record["question"] = dns_question(payload[8:])
    return record


def records(file: Path) -> list[dict[str, Any]]:
    """The recorded packets."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def listen(interface: str, gateway: str, inside: frozenset[str], file: Path) -> None:
    """Answer ARP and record packets until killed."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    wire.bind((interface, 0))
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    mac: bytes = wire.getsockname()[4]
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    while True:
        frame, origin = wire.recvfrom(65535)
        if origin[2] == socket.PACKET_OUTGOING:
            continue
        if (answer := arp_answer(frame, gateway, mac)) is not None:
            wire.send(answer)
        elif (record := leaving(frame, inside)) is not None:
            line = json.dumps({"time": round(time.time(), 3), **record})
            os.write(output, line.encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sink in the current namespace."""
    parser = argparse.ArgumentParser(prog="python3.13 -m lab.sink", description="records who tries to leave")
    parser.add_argument("--interface", required=True)
    parser.add_argument("--gateway", required=True, help="address to answer ARP for")
    parser.add_argument(
        "--inside", required=True, nargs="+", help="addresses of the lab: no packet to them is recorded"
    )
    parser.add_argument("--file", required=True, type=Path, help="where to append JSON lines")
    options = parser.parse_args(arguments)
    listen(options.interface, options.gateway, frozenset(options.inside), options.file)


if __name__ == "__main__":
    main()
