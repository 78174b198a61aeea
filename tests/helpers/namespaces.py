"""Two network namespaces with a cable between them. They end with the process, having no names."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """In this thread, and in programs that it starts, the network is the namespace's. Sockets stay in it."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    os.setns(namespace, os.CLONE_NEWNET)
    try:
        yield
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)


def namespace() -> int:
    """A descriptor of a new network namespace; OSError where the system has none to give."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    os.unshare(os.CLONE_NEWNET)
    try:
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    finally:
        os.setns(own, os.CLONE_NEWNET)
        os.close(own)


def ip(namespace: int, *commands: str) -> None:
    """Run commands of iproute2 in the namespace."""
    with inside(namespace):
        subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def cabled(here: list[str], there: list[str]) -> tuple[int, int]:
    """Two namespaces, the addresses (with prefix) of the interface `cable` in each."""
    ends = namespace(), namespace()
    far = f"/proc/{os.getpid()}/fd/{ends[1]}"
    ip(ends[0], f"link add cable type veth peer name cable netns {far}")
    for end, addresses in zip(ends, (here, there), strict=True):
        # An IPv6 address is usable at once, without the second that the look for a namesake takes.
        adds = [f"addr add {each} dev cable{' nodad' if ':' in each else ''}" for each in addresses]
        ip(end, "link set lo up", *adds, "link set cable up")
    return ends
