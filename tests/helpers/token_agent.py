"""A software stand-in for a FIDO2 token behind an ssh-agent: one key of type sk-ssh-ed25519@openssh.com.

It signs as a token does (OpenSSH's PROTOCOL.u2f): SHA-256 of the application, flags, counter and SHA-256 of the message. That
a person touched it or entered a PIN is said by its flags alone, which no hardware stands behind.
"""

import base64
import hashlib
import socketserver
import threading
from pathlib import Path
from types import TracebackType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TYPE = b"sk-ssh-ed25519@openssh.com"
APPLICATION = b"ssh:"
PRESENT, VERIFIED = 0x01, 0x04  # touched; its holder proved by a PIN or a finger
REQUEST_IDENTITIES, IDENTITIES, SIGN_REQUEST, SIGNATURE, FAILURE = (
    11,
    12,
    13,
    14,
    5,
)  # draft-ietf-sshm-ssh-agent


def string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def first_string(data: bytes) -> tuple[bytes, bytes]:
    """The string at the beginning, and the rest."""
    size = int.from_bytes(data[:4], "big")
    return data[4 : 4 + size], data[4 + size :]


class TokenAgent:
    """Listens on SOCKET while it is entered. FLAGS: what the token says of each signature."""

    def __init__(self, socket: Path, flags: int) -> None:
        self.socket, self.flags, self.counter = socket, flags, 0
        self.key = Ed25519PrivateKey.generate()
        self.blob = string(TYPE) + string(self.key.public_key().public_bytes_raw()) + string(APPLICATION)
        agent = self

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while size := self.rfile.read(4):
                    request = self.rfile.read(int.from_bytes(size, "big"))
                    self.wfile.write(string(agent.answer(request[0], request[1:])))

        self.server = socketserver.ThreadingUnixStreamServer(str(socket), Connection)
        self.server.daemon_threads = True

    @property
    def public(self) -> str:
        """The line of a .pub file."""
        return f"{TYPE.decode()} {base64.b64encode(self.blob).decode()}"

    def answer(self, request: int, body: bytes) -> bytes:
        """The agent's response to one message, type byte first."""
        if request == REQUEST_IDENTITIES:
            return bytes([IDENTITIES]) + (1).to_bytes(4, "big") + string(self.blob) + string(b"stand-in")
        if request != SIGN_REQUEST:
            return bytes([FAILURE])
        blob, rest = first_string(body)
        if blob != self.blob:
            return bytes([FAILURE])
        self.counter += 1
        tail = bytes([self.flags]) + self.counter.to_bytes(4, "big")
        message = hashlib.sha256(first_string(rest)[0]).digest()
        signed = self.key.sign(hashlib.sha256(APPLICATION).digest() + tail + message)
        return bytes([SIGNATURE]) + string(string(TYPE) + string(signed) + tail)

    def __enter__(self) -> "TokenAgent":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
