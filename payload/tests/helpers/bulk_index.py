"""What Elasticsearch does with bulk requests, as far as ratings are sent to it: a stand-in, over HTTP."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Document = dict[str, Any]
# `llm-serve` in a process of its own, whose `feedback ship` comes here.
SHIP = """
import sys
from elasticsearch import Elasticsearch
from llmserve.cli import main
from llmserve.feedback import ship
ship.connected = lambda url, _: Elasticsearch(url)
sys.exit(main(sys.argv[1:]))
"""


class Index(ThreadingHTTPServer):
    """What Elasticsearch does with bulk requests whose documents have versions of their own."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.documents: dict[tuple[str, str], tuple[int, Document]] = {}
        self.requests = 0
        self.away: list[int] = []  # statuses of the next requests
        self.refused: dict[str, list[int]] = {}  # by id: statuses of the next operations on it
        self.meanwhile: Callable[[], object] = lambda: None  # done before a request is answered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, index: str) -> dict[str, Document]:
        return {name: source for (where, name), (_, source) in self.documents.items() if where == index}

    def does(self, verb: str, target: Document, source: Document | None) -> int:
        """Carry out one operation; its status."""
        if self.refused.get(target["_id"]):
            return self.refused[target["_id"]].pop(0)
        name = target["_index"], target["_id"]
        version, there = target.get("version", 0), name in self.documents
        if there and (verb == "create" or version < self.documents[name][0]):
            return 409
        if source is None:
            self.documents.pop(name, None)
            return 200 if there else 404
        self.documents[name] = version, source
        return 201


class Asked(BaseHTTPRequestHandler):
    server: Index

    def do_PUT(self) -> None:
        lines = iter(self.rfile.read(int(self.headers["content-length"])).splitlines())
        self.server.requests += 1
        status = self.server.away.pop(0) if self.server.away else 200
        items = []
        for line in lines if status == 200 else []:
            [(verb, target)] = json.loads(line).items()
            done = self.server.does(verb, target, None if verb == "delete" else json.loads(next(lines)))
            told = {"_index": target["_index"], "_id": target["_id"], "status": done}
            error = (
                {"type": "strange_exception", "reason": "a secret"} if done >= 400 and done != 404 else None
            )
            items.append({verb: told | ({"error": error} if error else {})})
        self.server.meanwhile()
        body = json.dumps({"errors": False, "items": items}).encode()
        self.send_response(status)
        for name, value in {
            "content-type": "application/vnd.elasticsearch+json;compatible-with=9",
            "content-length": str(len(body)),
            "x-elastic-product": "Elasticsearch",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def indexing() -> Iterator[Index]:
    """Run an index within the block."""
    with Index() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
