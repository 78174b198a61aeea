"""An engine has no network, also where its container shares one with others."""

import subprocess
import sys
from pathlib import Path

import pytest
from service import running

TRIED = """
import errno, socket, subprocess, sys, threading
from llmserve.engine.sandbox import unix_sockets_only

def refused(family, kind):
    try:
        socket.socket(family, kind).close()
    except OSError as problem:
        return errno.errorcode[problem.errno]
    return "opened"

unix_sockets_only()
"""


def tried(code: str) -> str:
    """The output of a process that has called `unix_sockets_only`."""
    command = [sys.executable, "-c", TRIED + code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"])
def test_a_socket_of_a_network_is_refused(family: str) -> None:
    kind = "SOCK_STREAM" if family != "AF_NETLINK" else "SOCK_RAW"
    assert tried(f"print(refused(socket.{family}, socket.{kind}))") == "EAFNOSUPPORT"


def test_a_thread_and_a_program_that_it_starts_have_none_either() -> None:
    code = """
def run():
    print(refused(socket.AF_INET, socket.SOCK_DGRAM), flush=True)
    program = "import socket; socket.socket()"
    print(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.splitlines()[-1])
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    assert tried(code) == "EAFNOSUPPORT\nOSError: [Errno 97] Address family not supported by protocol"


def test_a_socket_cannot_be_had_from_io_uring() -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(425, 8, ctypes.create_string_buffer(120)), errno.errorcode[ctypes.get_errno()])
"""
    assert tried(code) == "-1 EAFNOSUPPORT"


def test_unix_sockets_remain() -> None:
    code = """
one, other = socket.socketpair()
one.send(b"yes")
print(other.recv(3).decode(), refused(socket.AF_UNIX, socket.SOCK_DGRAM))
"""
    assert tried(code) == "yes opened"


def test_an_engine_is_restricted(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        [engine] = service.engines.values()
        status = Path(f"/proc/{engine.process.pid}/status").read_text().splitlines()
    assert "Seccomp_filters:\t1" in status
