"""A stand-in of a model hub on loopback: the API, `resolve`, and a second server for large files, as a CDN.

Its answers have the form of the hub's (X-Linked-Etag, X-Repo-Commit, redirects, ranges). `python tests/helpers/hub_standin.py
OWNER/REPO FOLDER` serves a folder and prints HF_ENDPOINT and the source; large files are those of 32 KiB and more.
"""

import functools
import hashlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 32 << 10  # bytes from which on a file is in LFS
BLOCK = 16 << 10


@dataclass
class Request:
    """What a server was asked. `begin`: first byte of the range. `sent`: bytes of the body."""

    path: str
    begin: int
    authorization: str | None
    sent: int = 0


@dataclass
class HubStandIn:
    """A repository at one commit, and the faults that it has. `faults`: part of a path to status and headers.

    `wrong`: files of which other bytes are sent. `cut`: file to bytes after which the connection ends, once. `sending`: called
    before each block with the file and the bytes that were sent. `ranges`: whether ranges are honoured.
    """

    repository: str
    folder: Path
    commit: str = "c0ffee" * 6 + "c0ff"
    claimed: str | None = None
    token: str | None = None
    faults: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    sending: Callable[[str, int], None] = lambda _file, _sent: None
    ranges: bool = True
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    cdn: str = ""

    @property
    def source(self) -> str:
        return f"hub:{self.repository}@{self.commit}"

    def paths(self) -> dict[str, Path]:
        """The repository's files by path."""
        found = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): path for path in found}

    def fetched(self, file: str) -> list[Request]:
        """The requests for a file's bytes."""
        return [each for each in self.requests if each.path.endswith(f"/{file}") and each.sent]

    def listing(self) -> dict[str, Any]:
        """The hub's answer on the commit."""
        siblings = []
        for name, path in self.paths().items():
            entry: dict[str, Any] = {"rfilename": name, "size": path.stat().st_size, "blobId": blob_id(path)}
            if path.stat().st_size >= LARGE:
                entry["lfs"] = {"sha256": sha256(path), "size": entry["size"], "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repository, "sha": self.claimed or self.commit, "siblings": siblings}


@functools.cache
def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def blob_id(path: Path) -> str:
    """Git's id of a file, or of the pointer to a large one: of which only the form matters here."""
    content = path.read_bytes() if path.stat().st_size < LARGE else b"pointer"
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(hub: HubStandIn) -> Iterator[HubStandIn]:
    """Serve it on two ports of 127.0.0.1."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, cdn)) for cdn in (False, True)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: HubStandIn, cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK)

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            request = Request(path, begin, self.headers.get("Authorization"))
            hub.requests.append(request)
            for part, (status, headers) in hub.faults.items():
                if part in path:
                    return self.answer(status, b"{}", headers)
            if not cdn and hub.token and request.authorization != f"Bearer {hub.token}":
                return self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials"})
            if path in (
                f"/api/models/{hub.repository}",
                f"/api/models/{hub.repository}/revision/main",
                f"/api/models/{hub.repository}/revision/{hub.commit}",
            ):
                kind = {"Content-Type": "application/json"}
                return self.answer(200, json.dumps(hub.listing()).encode(), kind)
            name = path.removeprefix("/large/" if cdn else f"/{hub.repository}/resolve/{hub.commit}/")
            if (file := hub.paths().get(name)) is None or name == path:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            size = file.stat().st_size
            if not cdn and size >= LARGE:
                headers = {"Location": f"{hub.cdn}/large/{name}", "X-Linked-Etag": f'"{sha256(file)}"'}
                return self.answer(302, b"", headers | {"X-Linked-Size": str(size)})
            return self.send_file(name, file, size, request)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": hub.commit, **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_file(self, name: str, file: Path, size: int, request: Request) -> None:
            begin = request.begin if hub.ranges else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(size - begin))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
            self.end_headers()
            if self.command == "HEAD":
                return
            with file.open("rb") as stream:
                stream.seek(begin)
                while block := stream.read(BLOCK):
                    hub.sending(name, begin + request.sent)
                    if name in hub.wrong:
                        block = bytes([block[0] ^ 1]) + block[1:]
                    if (left := hub.cut.get(name, size) - begin - request.sent) < len(block):
                        del hub.cut[name]
                        self.close_connection = True
                        block = block[:left]
                    try:
                        self.wfile.write(block)
                    except OSError:
                        self.close_connection = True
                    request.sent += len(block)
                    if self.close_connection:
                        return

    return Handler


if __name__ == "__main__":
    with serving(HubStandIn(sys.argv[1], Path(sys.argv[2]))) as _hub:
        print(f"HF_ENDPOINT={_hub.endpoint} llmkeep model add {_hub.source}", flush=True)
        threading.Event().wait()
