"""What operators have in an estate: a webhook on port 9099 and a mail server on 2525.

alert_sink.py [NAME]

What arrives is appended to /run/alerts/webhook, /run/alerts/heartbeat (what is sent to that path) and
/run/alerts/mail. With this host's full NAME both have its certificate: the webhook takes TLS 1.3 with a client's
certificate of the estate, the mail server nothing before STARTTLS. Without it both listen on loopback, in clear.
"""

import socketserver
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path("/run/alerts")
TLS = len(sys.argv) == 2
# By the first four letters.
MAIL_ANSWERS = {b"DATA": b"354 go on", b"QUIT": b"221 bye", b"STAR": b"220 go on"}


def context() -> ssl.SSLContext:
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile="/etc/llmkeep/pki/root.pem")
    made.load_cert_chain("/etc/llmkeep/pki/host.pem", "/etc/llmkeep/pki/host.key")
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    return made


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
        secret = not TLS
        while line := self.rfile.readline():
            verb = line[:4].upper().strip()
            if verb == b"EHLO" and not secret:
                self.wfile.write(b"250-sink\r\n250 STARTTLS\r\n")
            elif verb in (b"MAIL", b"RCPT", b"DATA") and not secret:
                self.wfile.write(b"530 STARTTLS first\r\n")
            else:
                self.wfile.write(MAIL_ANSWERS.get(verb, b"250 sink") + b"\r\n")
                if verb == b"STAR":
                    connection = context().wrap_socket(self.request, server_side=True)
                    self.rfile, self.wfile = connection.makefile("rb"), connection.makefile("wb", 0)
                    secret = True
                if verb == b"DATA":
                    arrived("mail", b"".join(iter(self.rfile.readline, b".\r\n")))
                    self.wfile.write(b"250 taken\r\n")
                if verb == b"QUIT":
                    return


FOLDER.mkdir(exist_ok=True)
for kind in ("webhook", "heartbeat", "mail"):
    (FOLDER / kind).touch()
socketserver.ThreadingTCPServer.daemon_threads = True
socketserver.ThreadingTCPServer.allow_reuse_address = True
address = sys.argv[1] if TLS else "127.0.0.1"
webhook = ThreadingHTTPServer((address, 9099), Webhook)
if TLS:
    by_certificate = context()
    by_certificate.verify_mode = ssl.CERT_REQUIRED
    webhook.socket = by_certificate.wrap_socket(webhook.socket, server_side=True)
threading.Thread(target=webhook.serve_forever).start()
socketserver.ThreadingTCPServer((address, 2525), Mail).serve_forever()
