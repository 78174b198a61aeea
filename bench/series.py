#!/usr/bin/env python3
"""Measures Prometheus' cost per host: series, memory and disk, with the pages of a real host under many names.

The pages of exporters and gateways are read from a host of the running lab, twice, 15 s apart. Debian's prometheus, with the
estate's rules, then scrapes them as those of 5 and of 20 hosts, with each number moving on as it did between the two. It
scrapes each second instead of each 15, so that two hours' samples, 480 of each series, come in 8 minutes: memory and disk
are of the samples, whatever their times are. Needs `lab -i inventory/lab demo` with site.yml run.

    .venv/bin/python bench/series.py --instance scale --host llm1 --names 5 20
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN = 15
PORTS = {"node": 9100, "redis": 9121, "nginx": 9113, "gateway-1": 9464, "gateway-2": 9465}
READ = """
import json, time, urllib.request
def pages():
    return {name: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode() for name, port in PORTS.items()}
first = pages()
time.sleep(SECONDS)
print(json.dumps([first, pages()]))
"""
LINE = re.compile(r"^(\w+(?:\{.*\})?) (\S+)$")


class Page:
    """What a host shows, its numbers moving on by as much at each scrape."""

    def __init__(self, first: str, second: str) -> None:
        values = {found[1]: found[2] for line in first.splitlines() if (found := LINE.match(line))}
        self.parts: list[tuple[str, float, float]] = []
        for line in second.splitlines():
            if found := LINE.match(line):
                now = float(found[2])
                self.parts.append((found[1], now, now - float(values.get(found[1], now))))

    def text(self, number: int) -> bytes:
        """At the scrape NUMBER."""
        return "".join(f"{name} {now + number * step!r}\n" for name, now, step in self.parts).encode()


def pages_of(instance: str, host: str) -> dict[str, Page]:
    """By their names."""
    program = f"PORTS, SECONDS = {PORTS!r}, {SECONDS_BETWEEN}\n{READ}"
    argv = [str(ROOT / ".venv/bin/lab"), "--instance", instance, "exec", host, "--", "python3", "-c", program]
    first, second = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    return {name: Page(first[name], second[name]) for name in PORTS}


def served(pages: dict[str, Page]) -> ThreadingHTTPServer:
    """A server of /HOST/PAGE."""
    begun = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = pages[self.path.rpartition("/")[2]].text(int(time.monotonic() - begun))
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # Prometheus has ended
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            """Not one line for each scrape."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def configured(folder: Path, port: int, names: int, pages: list[str], rules: str) -> Path:
    """prometheus.yml: a job of each kind of page, as role prometheus has."""
    (folder / "rules.yml").write_text(rules)
    jobs: dict[str, list[dict[str, Any]]] = {}
    for name in pages:
        job, _, gateway = name.partition("-")
        for number in range(1, names + 1):
            labels = {"instance": f"llm{number}", "__metrics_path__": f"/llm{number}/{name}"}
            labels |= {"gateway": gateway} if gateway else {}
            jobs.setdefault(job, []).append({"targets": [f"127.0.0.1:{port}"], "labels": labels})
    config = {
        "global": {
            "scrape_interval": "1s",
            "evaluation_interval": "1s",
            "scrape_timeout": "1s",
            "sample_limit": 20000,
        },
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": job, "static_configs": targets} for job, targets in jobs.items()],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yml"


class Prometheus:
    """A running one."""

    def __init__(self, config: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.data = config.parent / "data"
        options = [f"--config.file={config}", f"--storage.tsdb.path={self.data}", "--web.enable-admin-api"]
        argv = ["prometheus", *options, f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"]
        self.process = subprocess.Popen(argv)

    def ask(self, path: str, method: str = "GET") -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            text: str = answer.read().decode()
        return text

    def figures(self) -> dict[str, float]:
        """Its own metrics without labels."""
        lines = (
            line.split() for line in self.ask("/metrics").splitlines() if line[0] != "#" and "{" not in line
        )
        return {name: float(value) for name, value in lines}

    def query(self, expression: str) -> list[tuple[str, float]]:
        """Job and value of each result."""
        said = json.loads(self.ask(f"/api/v1/query?query={urllib.parse.quote(expression)}"))
        return [(each["metric"].get("job", ""), float(each["value"][1])) for each in said["data"]["result"]]

    def on_disk(self) -> dict[str, int]:
        """Bytes of a block of all samples until now: `chunks` of them, `index` of the series."""
        name = json.loads(self.ask("/api/v1/admin/tsdb/snapshot", "POST"))["data"]["name"]
        folder = self.data / "snapshots" / name
        return {
            part: sum(
                path.stat().st_size for path in folder.rglob("*") if part in path.parts and path.is_file()
            )
            for part in ("chunks", "index")
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instance", default="lab")
    parser.add_argument("--host", default="llm1")
    parser.add_argument(
        "--control", default="ops1", help="the host that has Prometheus, whose rules are read"
    )
    parser.add_argument("--names", type=int, nargs="+", default=[5, 20], help="hosts that there would be")
    parser.add_argument("--samples", type=int, default=480)
    given = parser.parse_args()
    pages = pages_of(given.instance, given.host)
    argv = [
        str(ROOT / ".venv/bin/lab"),
        "--instance",
        given.instance,
        "exec",
        given.control,
        "--",
        "cat",
        "/etc/prometheus/rules.yml",
    ]
    rules = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    server = served(pages)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        running = []
        for names in given.names:
            folder = Path(name) / str(names)
            folder.mkdir()
            running.append(Prometheus(configured(folder, server.server_port, names, list(pages), rules)))
        try:
            time.sleep(given.samples)
            before: tuple[float, float] | None = None
            for names, prometheus in zip(given.names, running, strict=True):
                now = prometheus.figures()
                disk = prometheus.on_disk()
                series, appended = now["prometheus_tsdb_head_series"], 0.0
                for line in prometheus.ask("/metrics").splitlines():
                    if line.startswith('prometheus_tsdb_head_samples_appended_total{type="float"}'):
                        appended = float(line.split()[1])
                resident, heap = now["process_resident_memory_bytes"], now["go_memstats_heap_inuse_bytes"]
                print(f"{names} hosts: {series:.0f} series, {appended / series:.0f} samples of each; {resident / 2**20:.0f} MiB "
                      f"resident, {heap / 2**20:.0f} of heap; {disk['chunks'] / appended:.2f} bytes of disk a sample "
                      f"and {disk['index'] / series:.0f} a series; "
                      f"{1e6 * now['process_cpu_seconds_total'] / appended:.1f} µs of CPU a sample")  # fmt: skip
                if before:
                    print(
                        f"each series more: {(resident - before[1]) / (series - before[0]):.0f} bytes resident"
                    )
                before = series, resident
            for job, count in sorted(running[0].query("count by (job) ({instance='llm1'})")):
                print(f"{job or 'of rules'}: {count:.0f} series of a host")
        finally:
            for prometheus in running:
                prometheus.process.terminate()
                prometheus.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
