#!/usr/bin/python3
"""opa-query [--until PATTERN SECONDS] METHOD PATH [BODY]: one question to OPA's socket; prints status and answer.

With --until it retries, for SECONDS, until its output matches the regular expression. Exit 0: OPA answered, with such
output. Exit 1: prints OPA's last answer, or why none came.
"""

import http.client
import re
import socket
import sys
import time

SOCKET = "/run/opa/opa.sock"


def asked(method: str, path: str, body: str | None) -> tuple[bool, str]:
    link = http.client.HTTPConnection("opa")
    link.sock = socket.socket(socket.AF_UNIX)
    try:
        link.sock.settimeout(5)
        link.sock.connect(SOCKET)
        link.request(method, path, body, {"Content-Type": "application/json"})
        answer = link.getresponse()
        return True, f"{answer.status} {answer.read().decode().strip()}"
    except (OSError, http.client.HTTPException) as problem:
        return False, f"{SOCKET}: {problem}"
    finally:
        link.close()


def main() -> int:
    words = sys.argv[1:]
    pattern, seconds = "", "0"
    if words[:1] == ["--until"] and len(words) > 4:
        _, pattern, seconds, *words = words
    if len(words) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    method, path = words[:2]
    body = words[2] if len(words) == 3 else None
    end = time.monotonic() + float(seconds)
    while True:
        answered, text = asked(method, path, body)
        if answered and re.search(pattern, text):
            print(text)
            return 0
        if time.monotonic() >= end:
            print(text)
            return 1
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
