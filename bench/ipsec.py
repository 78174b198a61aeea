#!/usr/bin/python3.13
"""Measures the cost of ESP: one TCP stream between two hosts of a running lab with role ipsec, in clear and encrypted, in turns.

The same program sends on two ports: one that ESP covers, and one outside its range, which is opened while this runs. CPU is the
time that the two hosts' kernels and programs took on this machine, so other work does not count. Packets are counted on the
receiver's wire; if one stream is not pure TCP and the other pure ESP, the exit code is 1. A host of the lab computes AES without
the processor's instructions for it, so a host of an estate is far better off.
"""

import argparse
import ipaddress
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAB = str(ROOT / ".venv/bin/lab")
WAYS = {"clear": (20000, 20001), "esp": (32999, 33001)}  # ports of receiver and sender
MEGABYTE = 1_000_000
RECEIVE = """
import socket
door = socket.create_server(("", {port}))
print("ready", flush=True)
stream, _ = door.accept()
while stream.recv(1 << 20):
    pass
stream.send(b"x")
"""
SEND = """
import socket, time
stream = socket.socket()
stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
stream.bind(("", {own}))
stream.settimeout(300)
stream.connect(("{address}", {port}))
block = memoryview(bytes(1 << 20))
left, began = {size}, time.monotonic()
while left:
    left -= stream.send(block[:left])
stream.shutdown(socket.SHUT_WR)
stream.recv(1)
print(time.monotonic() - began)
"""
# Packets between the two, until its input ends: of the stream in clear, in ESP, and others (None).
COUNT = """
import collections, select, socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # all: IPv4 alone is the bridge's, who takes it first
wire.bind(("{tap}", 0))
wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
seen, between = collections.Counter(), {{bytes({one}), bytes({other})}}
print("ready", flush=True)
while True:
    ready, _, _ = select.select([wire, sys.stdin], [], [])
    if wire not in ready:
        break
    frame = wire.recv(1 << 16)
    if frame[12:14] == b"\\x08\\x00" and {{frame[26:30], frame[30:34]}} == between:
        ports = {{int.from_bytes(frame[34:36]), int.from_bytes(frame[36:38])}}
        seen[{{6: "tcp", 50: "esp"}}.get(frame[23]) if frame[23] != 6 or ports == {ports} else None] += 1
print(dict(seen))
"""


def on(host: str, *command: str) -> str:
    """What a command prints on a host of the lab."""
    done = subprocess.run([LAB, "exec", host, "--", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(command)[:300]} ended with {done.returncode} on {host}: {done.stdout}{done.stderr}"
        )
    return done.stdout


def begun(*argv: str) -> subprocess.Popen[str]:
    """A program that has said that it is ready."""
    program = subprocess.Popen([LAB, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    if program.stdout.readline() != "ready\n":
        sys.exit(f"{argv[:4]} did not become ready")
    return program


def processor_seconds(host: str) -> float:
    """Of this machine, that the host's kernel and the programs in it took so far."""
    folder = ROOT / ".lab/instances" / os.environ.get("LAB_INSTANCE", "lab") / "hosts" / host
    asked = {json.loads((folder / "kernel.json").read_text())["pid"]}
    ticks = 0
    stats = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        stats[int(entry.parent.name)] = fields
    while asked:
        ticks += sum(sum(map(int, stats[pid][11:15])) for pid in asked if pid in stats)
        asked = {pid for pid, fields in stats.items() if int(fields[1]) in asked}
    return ticks / os.sysconf("SC_CLK_TCK")


def stream(way: str, sender: str, receiver: str, address: str, megabytes: int) -> tuple[float, float]:
    """MB/s, and seconds of processor a GB on both hosts together."""
    port, own = WAYS[way]
    listening = begun("exec", receiver, "--", "python3", "-c", RECEIVE.format(port=port))
    before = processor_seconds(sender) + processor_seconds(receiver)
    size = megabytes * MEGABYTE
    seconds = float(on(sender, "python3", "-c", SEND.format(own=own, address=address, port=port, size=size)))
    taken = processor_seconds(sender) + processor_seconds(receiver) - before
    listening.communicate()
    return megabytes / seconds, taken / megabytes * 1000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sender")
    parser.add_argument("receiver")
    parser.add_argument("--rounds", type=int, default=7, help="the median of so many (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=64, help="per round (default: %(default)s)")
    given = parser.parse_args()
    hosts = json.loads(subprocess.run([LAB, "status", "--json"], capture_output=True, check=True).stdout)[
        "hosts"
    ]
    addresses = {host: hosts[host]["address"] for host in (given.sender, given.receiver)}
    one, other = (list(ipaddress.ip_address(address).packed) for address in addresses.values())
    tap = f"tap{addresses[given.receiver].rpartition('.')[2]}"
    seen: dict[str, dict[str, list[float]]] = {way: {"rate": [], "processor": []} for way in WAYS}
    alone = True
    try:
        for host in addresses:
            for chain, expression in (("input", "meta ipsec"), ("output", "rt ipsec")):
                for way, (port, _) in WAYS.items():
                    only = f"{expression} exists" if way == "esp" else ""
                    on(
                        host,
                        "nft",
                        "insert",
                        "rule",
                        "inet",
                        "llmkeep",
                        chain,
                        f"tcp dport {port} {only} accept",
                    )
        for number in range(given.rounds):
            for way in list(WAYS)[:: -1 if number % 2 else 1]:
                count = COUNT.format(tap=tap, one=one, other=other, ports=set(WAYS[way]))
                wire = begun("netns", "--", "python3", "-c", count)
                rate, processor = stream(
                    way, given.sender, given.receiver, addresses[given.receiver], given.megabytes
                )
                packets = wire.communicate()[0].strip()
                print(
                    f"{way}: {rate:.1f} MB/s, {processor:.1f} s of processor a GB; packets {packets}",
                    file=sys.stderr,
                )
                # What is in clear has to be seen, or the counter sees nothing.
                alone &= ("'tcp'" in packets, "'esp'" in packets) == (way == "clear", way == "esp")
                seen[way]["rate"].append(rate)
                seen[way]["processor"].append(processor)
    finally:
        for host in addresses:
            on(host, "systemctl", "reload", "nftables")
    print(
        f"median of {given.rounds} rounds of {given.megabytes} MB (least to most); load {os.getloadavg()[0]:.1f}\n"
    )
    print("| | MB/s | seconds of processor a GB, both hosts |\n|---|---|---|")
    for way, numbers in seen.items():
        cells = [
            f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in numbers.values()
        ]
        print(f"| {way} | {' | '.join(cells)} |")
    print("\non the wire, of what travels in ESP: " + ("ESP alone" if alone else "NOT SHOWN"))
    return 0 if alone else 1


if __name__ == "__main__":
    sys.exit(main())
