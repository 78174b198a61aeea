#!/usr/bin/python3
"""serve-policy FILE PORT: serves FILE to every client on 127.0.0.1, with its sha256 as ETag.

Its only client is the OPA that shares this unit's network namespace. OPA reads a bundle from a file once and never
again, and does not verify what --watch loads. From a server it loads a new bundle within its polling interval, and
keeps its current one if it refuses the new one.
"""

import hashlib
import http.server
import os
import socket
import sys
from pathlib import Path


class Policy(http.server.BaseHTTPRequestHandler):
    """One file, whatever the path."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        try:
            content = Path(sys.argv[1]).read_bytes()
        except OSError as problem:
            self.send_error(404, str(problem.strerror))
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        same = self.headers.get("If-None-Match") == tag
        self.send_response(304 if same else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", "0" if same else str(len(content)))
        self.end_headers()
        if not same:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing: OPA logs whether it accepts the file."""


def tell_systemd() -> None:
    """READY=1, for Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def main() -> int:
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        print(__doc__, file=sys.stderr)
        return 2
    with http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Policy) as server:
        tell_systemd()
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
