"""A question over TLS 1.3, and what is told about the way it went."""

import http.server
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.ask import ask
from lab.door import Door
from lab.errors import LabError

KEY = "llmk_abc_secret"


class Edge(http.server.BaseHTTPRequestHandler):
    """Answers as the estate's edge does, which has cached answers to all questions."""

    protocol_version = "HTTP/1.1"
    events: tuple[Any, ...] = ()

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {KEY}"
        body = json.dumps(
            {"data": [{"id": "model"}]} if known else {"error": {"message": "no such key"}}
        ).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] is True
        cached = self.headers["Cache-Control"] != "no-cache"
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for event in [piece("from the cache")] if cached else self.events:
            self.wfile.write(b": a comment\ndata: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def edge(
    folder: Path, *events: Any, key: str = KEY, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Iterator[Door]:
    certificate, private, key_file = folder / "ca.pem", folder / "key.pem", folder / "key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(private), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    key_file.write_text(f"{key}\n", encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    context.maximum_version = newest
    handler = type("Answers", (Edge,), {"events": events})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # refused handshakes are what is tested
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Door(f"https://localhost:{server.server_address[1]}", certificate, key_file, folder / "env")
    server.shutdown()
    server.server_close()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], "usage": None}


def test_tells_the_answer_as_it_comes_and_how_it_was_protected(tmp_path: Path) -> None:
    shown: list[str] = []
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    with edge(tmp_path, piece("Paris"), piece(" it is."), usage) as door:
        answer = ask(door, "What is the capital of France?", shown.append)
    assert shown == ["Paris", " it is."]
    assert (answer.model, answer.text, answer.tokens) == ("model", "Paris it is.", 3)
    assert answer.tls_version == "TLSv1.3"
    assert answer.key_exchange_group not in ("", "unknown")
    assert answer.time_to_first_token > 0


def test_refuses_an_older_tls(tmp_path: Path) -> None:
    with (
        edge(tmp_path, newest=ssl.TLSVersion.TLSv1_2) as door,
        pytest.raises(LabError, match="does not answer"),
    ):
        ask(door, "?")


def test_a_wrong_key_is_told_with_the_status(tmp_path: Path) -> None:
    with (
        edge(tmp_path, key="llmk_abc_other") as door,
        pytest.raises(LabError, match=r"401.*no such key"),
    ):
        ask(door, "?")


def test_an_answer_that_breaks_off_is_no_answer(tmp_path: Path) -> None:
    with (
        edge(tmp_path, piece("Par"), {"error": {"message": "engine died"}}) as door,
        pytest.raises(LabError, match="engine died"),
    ):
        ask(door, "?")


def test_an_empty_answer_is_no_answer(tmp_path: Path) -> None:
    with edge(tmp_path) as door, pytest.raises(LabError, match="empty"):
        ask(door, "?")
