"""The network of a lab: a bridge in a network namespace without an uplink.

The bridge has one address, the seat. The gateway's address is assigned to no interface: the sink answers ARP for
it (sink.py), so that packets to other networks are sent, recorded, and never answered.
"""

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from lab.errors import LabError
from lab.inventory import Lab

BRIDGE = "lab"
GATEWAY_MAC = "02:00:00:00:00:01"
NAMESPACES = Path("/run/netns")


def mac(address: str) -> str:
    """The hardware address of the host with this IPv4 address."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def tap(address: str) -> str:
    """The tap of the host with this IPv4 address: the cable between it and the bridge."""
    return f"tap{address.rpartition('.')[2]}"


class Namespace:
    """A named network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = NAMESPACES / name

    def exists(self) -> bool:
        """Whether it exists and is usable; a name left behind by an interrupted command is not."""
        try:
            return self.path.stat().st_dev != self.path.parent.stat().st_dev
        except FileNotFoundError:
            return False

    def holds(self, pid: int | None) -> bool:
        """Whether a process runs inside."""
        if pid is None or not self.exists():
            return False
        try:
            return Path(f"/proc/{pid}/ns/net").stat().st_ino == self.path.stat().st_ino
        except OSError:
            return False

    def command(self, *command: str) -> list[str]:
        """Command line that runs a command inside, with the same process id."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def ip(self, *arguments: str) -> None:
        """Run `ip` inside; LabError with its message if it refuses."""
        _run(["ip", "-n", self.name, *arguments])

    def links(self) -> set[str]:
        """Names of the interfaces inside."""
        listing = subprocess.run(
            ["ip", "-n", self.name, "-brief", "link"], check=True, capture_output=True, text=True
        ).stdout
        return {line.split()[0].partition("@")[0] for line in listing.splitlines() if line.strip()}

    def create(self, lab: Lab) -> None:
        """Create the namespace, its loopback and its bridge, or the parts that are missing."""
        if not self.exists():
            self.path.unlink(missing_ok=True)
            _run(["ip", "netns", "add", self.name])
        _run(
            self.command(
                "sysctl",
                "-q",
                "-w",
                "net.ipv4.ip_forward=0",
                "net.ipv4.conf.all.arp_ignore=1",  # nobody answers a host whose cable is out
                "net.ipv6.conf.all.disable_ipv6=1",
                "net.ipv6.conf.default.disable_ipv6=1",
            )
        )
        self.ip("link", "set", "lo", "up")
        if BRIDGE not in self.links():
            self.ip("link", "add", BRIDGE, "address", GATEWAY_MAC, "type", "bridge", "forward_delay", "0")
        self.ip("address", "replace", f"{lab.seat}/{lab.network.prefixlen}", "dev", BRIDGE)
        self.ip("link", "set", BRIDGE, "up")

    def plug_cable(self, name: str) -> None:
        """Create a tap on the bridge and set it up."""
        if name not in self.links():
            self.ip("tuntap", "add", name, "mode", "tap")
        self.attach(name)
        self.ip("link", "set", name, "up")

    def plug_pair(self, name: str, address: str) -> None:
        """Create a pair of interfaces: `name` on the bridge, and `cNAME` for the container with this IPv4 address."""
        if name in self.links():
            self.ip("link", "delete", name)
        self.ip("link", "add", name, "type", "veth", "peer", "name", f"c{name}", "address", mac(address))
        self.attach(name)
        self.ip("link", "set", name, "up")

    def attach(self, name: str) -> None:
        """Connect a tap to the bridge."""
        self.ip("link", "set", name, "master", BRIDGE)

    def detach(self, name: str) -> None:
        """Disconnect a tap from the bridge. It stays up, since a user-mode kernel that cannot write to it stops for good."""
        self.ip("link", "set", name, "nomaster")

    def attached(self, name: str) -> bool:
        """Whether a tap is connected to the bridge."""
        shown = subprocess.run(
            ["ip", "-n", self.name, "link", "show", "dev", name, "master", BRIDGE],
            check=False,
            capture_output=True,
            text=True,
        )
        return shown.returncode == 0 and bool(shown.stdout.strip())

    def delete(self) -> None:
        """Delete the namespace; the kernel frees it with its last process."""
        if self.exists():
            _run(["ip", "netns", "delete", self.name])
        self.path.unlink(missing_ok=True)

    def processes(self) -> list[int]:
        """Processes inside."""
        if not self.exists():
            return []
        listing = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        return [int(pid) for pid in listing.stdout.split()]

    def within[Result](self, action: Callable[[], Result]) -> Result:
        """Call a function in a thread inside the namespace, so that its sockets are inside too."""
        results: list[Result] = []
        failures: list[BaseException] = []

        def enter() -> None:
            try:
                with self.path.open("rb") as handle:
                    os.setns(handle.fileno(), os.CLONE_NEWNET)
                results.append(action())
            except BaseException as error:  # handed to the caller below
                failures.append(error)

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` failed ({done.returncode}): {done.stderr.strip()}")
