"""Debian's Prometheus with some scrape jobs, in the network of this thread."""

import http.client
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from waiting import own_port

Query = Callable[[str], list[Any]]


@contextmanager
def prometheus_here(folder: Path, jobs: list[dict[str, Any]]) -> Iterator[Query]:
    """What an expression finds now; nothing until Prometheus listens. It scrapes every second."""
    config, port = folder / "jobs.yml", own_port()
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'samples'}"]
    process = subprocess.Popen([*argv, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"])

    def query(expression: str) -> list[Any]:
        assert process.poll() is None, "Prometheus has ended"
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            link.request("GET", f"/api/v1/query?query={quote(expression)}")
            answer = link.getresponse()
        except ConnectionError:
            return []
        said = answer.read().decode()
        if answer.status == http.client.SERVICE_UNAVAILABLE:  # it reads its log
            return []
        assert answer.status == http.client.OK, said
        found: list[Any] = json.loads(said)["data"]["result"]
        return found

    try:
        yield query
    finally:
        process.terminate()
        process.wait()
