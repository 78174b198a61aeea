"""A fake of OPA's HTTP API that misbehaves in ways that the real one cannot be made to."""

import json
import socket
import socketserver
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

ALLOWED: dict[str, Any] = {
    "allow": True,
    "reason": "granted by the role analyst",
    "rule": "roles/analyst",
    "revision": 7,
    "models": ["*"],
    "max_tokens": 256,
    "rate_class": "standard",
    "rate": {
        "priority": 5,
        "requests_per_minute": 10**6,
        "tokens_per_minute": 10**9,
        "tokens_per_day": 10**12,
    },
    "log_prompt": False,
    "keep_prompts": False,
    "weight": 1,
    "experiments": [],
    "reviews": [],
    "roles": ["analyst"],
    "aliases": {},
}
DENIED = {"allow": False, "reason": "no role of yours permits it", "rule": "default_deny", "revision": 7}


def answer(**changes: Any) -> tuple[int, bytes]:
    """200 with the allowing decision, with `changes`."""
    return 200, json.dumps({"result": {**ALLOWED, **changes}}).encode()


# Invalid responses by name; with each of them, every request must be denied.
MISBEHAVIOUR: dict[str, tuple[int, bytes]] = {
    "an empty object": (200, b"{}"),
    "an empty body": (200, b""),
    "no JSON": (200, b"<html>ok</html>"),
    "half of a decision": (200, b'{"result": {"allow": true, "revi'),
    "a result that is just true": (200, b'{"result": true}'),
    "a result that is null": (200, b'{"result": null}'),
    "a list": (200, b'[{"result": {"allow": true}}]'),
    "allow as a text": answer(allow="true"),
    "allow as a number": answer(allow=1),
    "no allow": (200, json.dumps({"result": {k: v for k, v in ALLOWED.items() if k != "allow"}}).encode()),
    "no revision": answer(revision=None),
    "a revision as text": answer(revision="7"),
    "a revision as true": answer(revision=True),
    "revision zero": answer(revision=0),
    "models that are not a list": answer(models="*"),
    "no rate": answer(rate=None),
    "a negative limit": answer(max_tokens=-1),
    "a weight of zero": answer(weight=0),
    "a weight as text": answer(weight="1"),
    "roles that are not a list": answer(roles="analyst"),
    "aliases that are a list": answer(aliases=["default"]),
    "an alias that is a text": answer(aliases={"default": "echo"}),
    "an alias without a model": answer(aliases={"default": {}}),
    "an alias with a day that there is not": answer(
        aliases={"old": {"model": "echo", "deprecated": "2026-02-30"}}
    ),
    "an expired policy": answer(allow=False, rule="policy_expired"),
    "an error": (500, answer()[1]),
    "not found": (404, answer()[1]),
    "unauthorized": (401, b'{"code": "unauthorized"}'),
    "a redirect": (307, answer()[1]),
    "megabytes": (200, b'{"result": {"allow": true, "reason": "' + b"x" * 1_000_000 + b'"}}'),
}


class Server(socketserver.ThreadingUnixStreamServer):
    """Records its requests, and sends the configured response."""

    daemon_threads = True
    reply: tuple[int, bytes] = answer()
    delay = 0.0
    hang_up = False
    questions: list[dict[str, Any]]
    connections = 0

    def get_request(self) -> tuple[socket.socket, str]:
        self.connections += 1
        accepted: tuple[socket.socket, str] = super().get_request()
        return accepted


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        self.server.questions.append(query)
        time.sleep(self.server.delay)
        if self.server.hang_up:
            self.close_connection = True
            return
        status, body = self.server.reply
        with suppress(BrokenPipeError, ConnectionResetError):  # the gateway did not wait, as it should
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class ScriptedOpa:
    """The server in a thread, on a socket that can be stopped and started."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.start()

    def start(self) -> None:
        """Start it; it answers with ALLOWED."""
        self.server = Server(str(self.socket), Handler)
        self.server.questions = []
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def stop(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()
        self.socket.unlink(missing_ok=True)
        self.server.hang_up = True

    def queries(self) -> list[dict[str, Any]]:
        """The inputs so far, without the gateway's own probes."""
        return [each for each in self.server.questions if each["subject"] != "llm-gateway"]
