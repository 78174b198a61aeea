"""A mirror of a bundle on loopback: TLS, ranges, and what can be wrong with it."""

import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from typing import Any

WEIGHTS = bytes(range(256)) * 5000
FLOOD = 128 << 20


@dataclass
class Served:
    """What the mirror has, what was asked of it, after how many bytes it hangs up (once), what it answers without end, and how
    often it is busy before it gives a model's file."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    cut_after: int | None = None
    busy: int = 0
    endless: dict[str, int] = field(default_factory=dict)
    flooded: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def do_GET(self) -> None:
        asked_range = self.headers.get("Range")
        self.served.asked.append((self.path, asked_range))
        if self.path in self.served.endless:
            self.flood(self.served.endless[self.path])
            return
        if self.served.busy and "model" in self.path:
            self.served.busy -= 1
            self.send_response(503)
            self.send_header("Retry-After", "20")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.served.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin = int(asked_range.removeprefix("bytes=").removesuffix("-")) if asked_range else 0
        self.send_response(206 if asked_range else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.served.cut_after is not None and "model" in self.path:
            end, self.served.cut_after = self.served.cut_after, None
            self.wfile.write(content[begin:end])
            self.close_connection = True
        else:
            self.wfile.write(content[begin:])

    def flood(self, status: int) -> None:
        """An answer of FLOOD bytes that states no length; flooded says how many the client took."""
        self.send_response(status)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while self.served.flooded < FLOOD:
                self.wfile.write(bytes(1 << 20))
                self.served.flooded += 1 << 20
        except OSError:
            self.served.hung_up.set()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def publish(state: Served, model: dict[str, bytes], folder: str = "models/m") -> None:
    listed = [
        {"path": f"{folder}/{name}", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in model.items()
    ]
    state.files = {f"{folder}/{name}": content for name, content in model.items()}
    state.files["MANIFEST.json"] = json.dumps({"type": "bundle", "serial": 7, "files": listed}).encode()
    state.files["MANIFEST.json.sig"] = b"signed"
