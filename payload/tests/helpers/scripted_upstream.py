"""A server of OpenAI's API that responds with scripted bytes, over a UNIX socket or TLS."""

import json
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 4096, "root": "/srv/m"}]}
PASSAGE = re.compile(r'<passage number="(\d+)">\n(.*?)\n</passage>', re.DOTALL)  # as the gateway presents it
Script = list[bytes | float]  # bytes to send, seconds to wait


def answer(body: object, status: int = 200) -> Script:
    """A complete HTTP response."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return [b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content]


def chunk(content: object) -> bytes:
    """One event of a stream in vLLM's format."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str, reason: str | None = None) -> bytes:
    """An event with a piece of a chat answer's text."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}
    return chunk({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]})


USAGE = chunk({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
END = b"data: [DONE]\n\n"


def stream(*pieces: bytes | float, whole: bool = True) -> Script:
    """A chunked response; without `whole` the connection ends prematurely."""
    script: Script = [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    ]
    for piece in pieces:
        script.append(piece if isinstance(piece, float) else b"%x\r\n%s\r\n" % (len(piece), piece))
    return [*script, b"0\r\n\r\n"] if whole else script


class ScriptedUpstream:
    """Responds to every request with `script`, and records the request."""

    def __init__(self, address: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        """Listen on the path of a UNIX socket, or on a port of 127.0.0.1."""
        self.listener = socket.socket(socket.AF_UNIX if address else socket.AF_INET)
        self.listener.bind(str(address) if address else ("127.0.0.1", 0))
        self.listener.listen(64)
        self.port = 0 if address else self.listener.getsockname()[1]
        self.tls = tls
        self.script: Script = []
        self.models: Script = answer(MODELS)
        self.described: Script = answer({}, 404)  # its OpenAPI document
        self.requests: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0
        self.reuse = False  # whether a connection serves several requests
        self.hung_up = threading.Event()  # set when a client disconnects before the script ends
        self.open: set[socket.socket] = set()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Serve each connection in a thread."""
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """Serve the requests of a connection, which ends after the script unless `reuse` is set."""
        with suppress(OSError):
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            self.open.add(connection)
            with connection:
                while self.answered(connection):
                    pass

    def answered(self, connection: socket.socket) -> bool:
        """Respond to one request; returns whether the connection goes on."""
        head, body = self.read(connection)
        if head.startswith("GET /v1/models "):
            self.play(connection, self.models)
            return True
        if head.startswith("GET /openapi.json "):
            self.play(connection, self.described)
            return True
        self.heads.append(head)
        self.requests.append(json.loads(body))
        try:
            self.play(connection, self.script)
        except OSError:
            self.hung_up.set()
        return self.reuse

    def read(self, connection: socket.socket) -> tuple[str, bytes]:
        """Head and body of a request; raises OSError where the connection ends."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.received(connection)
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
        while len(body) < int(lengths[0] if lengths else 0):
            body += self.received(connection)
        return head.decode(), body

    def received(self, connection: socket.socket) -> bytes:
        if data := connection.recv(65536):
            return data
        raise ConnectionResetError

    def play(self, connection: socket.socket, script: Script) -> None:
        """Send the bytes and sleep as scripted."""
        for each in script:
            if isinstance(each, float):
                time.sleep(each)
            else:
                connection.sendall(each)

    def stop(self) -> None:
        """Close all connections, and stop listening."""
        self.listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake the thread that accepts
        self.listener.close()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class QuotingUpstream(ScriptedUpstream):
    """A stand-in for a model that answers from passages: quotes the one that shares most pairs of letters with the question."""

    def play(self, connection: socket.socket, script: Script) -> None:
        super().play(connection, self.quotation() if script is self.script else script)

    def quotation(self) -> Script:
        system, *_, question = (message["content"] for message in self.requests[-1]["messages"])
        passages = PASSAGE.findall(system)
        asked = set(pairwise(question.lower()))
        number, text = max(passages, key=lambda passage: len(asked & set(pairwise(passage[1].lower()))))
        return stream(delta(f"\u201c{text.strip()}\u201d [{number}]"), delta("", "stop"), USAGE, END)
