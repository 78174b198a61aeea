"""gateway_status.py STATUS PATH SOCKET…: exit 1 with the first answer to GET PATH that has another status."""

import http.client
import socket
import sys

SECONDS = 30


def answer(place: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("gateway", timeout=SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(SECONDS)
    connection.sock.connect(place)
    connection.request("GET", path, headers={"Connection": "close"})
    response = connection.getresponse()
    return response.status, response.read(500).decode()


def main() -> None:
    expected, path = int(sys.argv[1]), sys.argv[2]
    for place in sys.argv[3:]:
        status, text = answer(place, path)
        if status != expected:
            sys.exit(f"{place}: {status} {text}")


if __name__ == "__main__":
    main()
