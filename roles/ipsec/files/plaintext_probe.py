#!/usr/bin/python3
"""plaintext-probe OWN PEER PORT OTHER: does this host's firewall let a packet pass in clear?

It loads the rules that hold here into a network namespace that nobody else sees, in which no IPsec is, as on a host whose
strongSwan is gone. A peer of that address beside it, without rules, shares a connection with it that was made before: nothing
may arrive on it in either direction, and no new connection may come to be. OWN and PEER are addresses, PORT and OTHER two
of the ports. Exit 0: nothing passed. Exit 1: it says what did, or why it could not try.
"""

import os
import select
import socket
import subprocess
import sys

# A packet is with the other end when send() returns, for both are here; this is for a slow machine.
PATIENCE_SECONDS = 1
TRACK = "table inet tracked { chain c { type filter hook prerouting priority 0; ct state new accept; }; }"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def rules(text: str) -> None:
    subprocess.run(["nft", "--file", "-"], input=text, text=True, check=True)


def network() -> int:
    """A new network namespace, which this process is in afterwards."""
    os.unshare(os.CLONE_NEWNET)
    ip("link", "set", "lo", "up")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def cable(own: str, peer: str, device: str) -> None:
    ip("address", "add", own, "peer", peer, "dev", device, *(["nodad"] if ":" in own else []))
    ip("link", "set", device, "up")


def bound(address: str, port: int) -> socket.socket:
    end = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    end.bind((address, port))
    return end


def listening(address: str, port: int) -> socket.socket:
    end = bound(address, port)
    end.listen()
    return end


def main() -> int:
    if len(sys.argv) != 5:
        print(__doc__, file=sys.stderr)
        return 2
    own, peer, port, other = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    held = subprocess.run(
        ["nft", "list", "table", "inet", "llmkeep"], check=True, capture_output=True, text=True
    )
    there, here = network(), network()
    ip(
        "link",
        "add",
        "here",
        "type",
        "veth",
        "peer",
        "name",
        "there",
        "netns",
        f"/proc/{os.getpid()}/fd/{there}",
    )
    cable(own, peer, "here")
    os.setns(there, os.CLONE_NEWNET)
    cable(peer, own, "there")

    # Before the rules everything passes, or silence would prove nothing.
    os.setns(here, os.CLONE_NEWNET)
    rules(TRACK)
    doors = {door: listening(own, door) for door in (port, other)}
    os.setns(there, os.CLONE_NEWNET)
    theirs = bound(peer, other)
    theirs.settimeout(10)
    theirs.connect((own, port))
    ours = doors[port].accept()[0]
    for sender, receiver in ((ours, theirs), (theirs, ours)):
        receiver.settimeout(10)
        sender.send(b"x")
        receiver.recv(1)

    os.setns(here, os.CLONE_NEWNET)
    rules(held.stdout)
    ours.send(b"x")
    theirs.send(b"x")
    os.setns(there, os.CLONE_NEWNET)
    callers = [bound(peer, source) for source in (port, 1023)]
    for caller in callers:
        caller.setblocking(False)
        caller.connect_ex((own, other))
    watched: dict[socket.socket, str] = {
        theirs: "what this host sends on a connection that stands",
        ours: "what a peer sends on a connection that stands",
        doors[other]: "a new connection from a peer",
    }
    ends, _, _ = select.select(list(watched), [], [], PATIENCE_SECONDS)
    for end in ends:
        print(f"in clear passes: {watched[end]}")
    return 1 if ends else 0


if __name__ == "__main__":
    sys.exit(main())
