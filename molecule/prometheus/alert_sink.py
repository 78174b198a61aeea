"""What operators have in an estate: a webhook on 127.0.0.1:9099 and a mail server on 2525.

What arrives is appended to /run/alerts/webhook, /run/alerts/heartbeat (what is sent to that path) and /run/alerts/mail.
"""

import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path("/run/alerts")


def arrived(name: str, what: bytes) -> None:
    with (FOLDER / name).open("ab") as file:
        file.write(what + b"\n")


class Webhook(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        arrived(
            "heartbeat" if self.path == "/heartbeat" else "webhook",
            self.rfile.read(int(self.headers["content-length"])),
        )
        self.send_response(200)
        self.end_headers()


class Mail(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"220 sink\r\n")
        for line in self.rfile:
            verb = line[:4].upper().strip()
            self.wfile.write({b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}.get(verb, b"250 sink\r\n"))
            if verb == b"DATA":
                arrived("mail", b"".join(iter(self.rfile.readline, b".\r\n")))
                self.wfile.write(b"250 taken\r\n")
            if verb == b"QUIT":
                return


FOLDER.mkdir(exist_ok=True)
for kind in ("webhook", "heartbeat", "mail"):
    (FOLDER / kind).touch()
threading.Thread(target=ThreadingHTTPServer(("127.0.0.1", 9099), Webhook).serve_forever).start()
socketserver.ThreadingTCPServer.daemon_threads = True
socketserver.ThreadingTCPServer(("127.0.0.1", 2525), Mail).serve_forever()
