#!/usr/bin/python3
"""bounded-downloads URL LIMIT BUNDLE RELEASES: does the mirror refuse more than LIMIT concurrent downloads of weights?

Requests the largest file LIMIT + 1 times, and reads only the status of the answers. Exit 0: yes, or no served file is large
enough to tell. Exit 1: prints the answers.
"""

import contextlib
import socket
import ssl
import sys
import urllib.parse
from pathlib import Path

LARGE = 16 << 20  # bytes; a smaller file fits into a connection's buffers and occupies no slot


def largest(bundle: Path, releases: Path) -> tuple[int, str]:
    """Size and path on the mirror of the largest file of weights; size 0 without any."""
    places = [
        (bundle / "models", "/models"),
        *((path, f"/releases/{path.parent.name}/models") for path in releases.glob("[!.]*/models")),
    ]
    files = [(0, "")]
    for folder, served in places:
        for path in folder.rglob("*"):
            if path.is_file():
                files.append((path.stat().st_size, f"{served}/{path.relative_to(folder)}"))
    return max(files)


def main() -> int:
    url, limit, bundle, releases = sys.argv[1:]
    size, path = largest(Path(bundle), Path(releases))
    if size < LARGE:
        print(f"no served file of weights has {LARGE >> 20} MiB")
        return 0
    host = urllib.parse.urlsplit(url)
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain("/etc/llmkeep/pki/host.pem", "/etc/llmkeep/pki/host.key")
    request = f"GET {urllib.parse.quote(path)} HTTP/1.1\r\nHost: {host.hostname}\r\nConnection: close\r\n\r\n"
    answers = []
    with contextlib.ExitStack() as held:
        for _ in range(int(limit) + 1):
            plain = held.enter_context(socket.create_connection((host.hostname, host.port), timeout=5))
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection = held.enter_context(context.wrap_socket(plain, server_hostname=host.hostname))
            connection.sendall(request.encode())
            answers.append(connection.recv(64).partition(b"\r\n")[0].decode(errors="replace"))
    served = sum(" 200" in each for each in answers)
    busy = sum(" 503" in each for each in answers)
    print(
        f"of {len(answers)} downloads at once {served} were served, {busy} refused with 503; the last answer: {answers[-1]}"
    )
    return int(busy == 0 or served > int(limit))


if __name__ == "__main__":
    sys.exit(main())
