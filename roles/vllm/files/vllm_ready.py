#!/usr/bin/python3
"""vllm-ready SECONDS STATUS PATH SOCKET…: wait until each server answers GET PATH with STATUS.

Exit 0: each does. Exit 1: prints the first that does not, and its answer. With MAINPID in the environment, as set by systemd,
the wait stops once that process has ended.
"""

import http.client
import os
import socket
import sys
import time


def status(path: str, place: str) -> str:
    """A server's answer, or why there is none."""
    connection = http.client.HTTPConnection("vllm", timeout=10)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        connection.sock.connect(place)
        connection.request("GET", path, headers={"Connection": "close"})
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as problem:
        return f"{type(problem).__name__}: {problem}"
    finally:
        connection.close()


def ended() -> bool:
    """Whether the server's process is known and has ended."""
    try:
        if process := int(os.environ.get("MAINPID", 0)):
            os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def main() -> int:
    if len(sys.argv) < 5:
        print(__doc__, file=sys.stderr)
        return 2
    end = time.monotonic() + float(sys.argv[1])
    for place in sys.argv[4:]:
        while (answer := status(sys.argv[3], place)) != sys.argv[2]:
            if time.monotonic() > end or ended():
                why = "its process has ended" if ended() else f"{sys.argv[1]} s are over"
                print(f"{place} says {answer} to GET {sys.argv[3]}, and not {sys.argv[2]}; {why}")
                return 1
            time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
