#!/usr/bin/python3.13
"""What the gateway costs: requests a second, CPU a request, p50 and p99, beside a bare ASGI application.

Both are served by uvicorn (uvloop, httptools, one worker) on a UNIX socket, and measured in turns in the same
run, since on a machine that does other work too only ratios are comparable. The gateway does all it does in
production (request id, body limit, key, admission, metrics, access log) before the `echo` engine, which has a
process of its own.

Needs nothing but `make env`. Exit code 0, or 1 if a request failed.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / "payload/.venv/bin/python")
QUESTION = {"model": "echo", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
PEPPER_BYTES = 32


@dataclass
class Round:
    """One measurement. `cpu_us`: microseconds of CPU a request, of the server; the engine's beside it."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    engine_cpu_us: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


class Connection(asyncio.Protocol):
    """Asks again as soon as the answer is there, and notes how long each took."""

    def __init__(self, request: bytes, latencies: list[float], done: asyncio.Future[None]) -> None:
        """`latencies` in seconds, shared by all connections."""
        self.request = request
        self.latencies = latencies
        self.done = done
        self.received = b""
        self.stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a UNIX stream socket was asked for")
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Send the request."""
        self.asked = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """A part of the answer."""
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.fail(RuntimeError(f"not answered: {self.received[:300]!r}"))
            return
        self.latencies.append(time.perf_counter() - self.asked)
        self.received = b""
        if self.stopping:
            self.transport.close()
            if not self.done.done():
                self.done.set_result(None)
        else:
            self.ask()

    def fail(self, error: Exception) -> None:
        """Tell `load`."""
        if not self.done.done():
            self.done.set_exception(error)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Before the end this is a failure."""
        if not self.done.done():
            self.done.set_exception(exc or RuntimeError("the server has closed the connection"))


def hand_over(client: Connection) -> Connection:
    """A protocol factory for one connection."""
    return client


async def load(socket: Path, request: bytes, connections: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of all requests of `connections` that ask one after the other, and how long it took."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    clients, ends = [], []
    before = time.perf_counter()
    for _ in range(connections):
        done = loop.create_future()
        client = Connection(request, latencies, done)
        await loop.create_unix_connection(partial(hand_over, client), str(socket))
        clients.append(client)
        ends.append(done)
    await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for client in clients:
        client.stopping = True
    async with asyncio.timeout(30):
        await asyncio.gather(*ends)
    return latencies, time.perf_counter() - before


def cpu_seconds(process: int) -> float:
    """CPU time of all threads of `process`, from the scheduler's own nanoseconds."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def measure(server: "Server", connections: int, seconds: float) -> Round:
    """One round, after a short one that warms up."""
    asyncio.run(load(server.socket, server.request, connections, 0.3))
    before = [cpu_seconds(process) for process in server.processes]
    latencies, took = asyncio.run(load(server.socket, server.request, connections, seconds))
    used = [cpu_seconds(process) - start for process, start in zip(server.processes, before, strict=True)]
    count = len(latencies)
    cuts = statistics.quantiles(latencies, n=100)
    engine = sum(used[1:]) / count * 1e6
    return Round(count, took, cuts[49] * 1e3, cuts[98] * 1e3, used[0] / count * 1e6, engine)


@dataclass
class Server:
    """Where to ask, what, and whose CPU counts; the first process is the server itself."""

    name: str
    socket: Path
    request: bytes
    processes: list[int]


def http_request(key: str) -> bytes:
    """The question as bytes."""
    body = json.dumps(QUESTION).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: llm",
        "content-type: application/json",
        f"authorization: Bearer {key}",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def servers(folder: Path, cores: tuple[set[int], set[int]]) -> Iterator[list[Server]]:
    """The bare application and the gateway, running on cores[0]; the engine too."""
    pepper, keys = folder / "pepper", folder / "keys.json"
    pepper.write_bytes(os.urandom(PEPPER_BYTES))
    who = ["--subject", "bench", "--tenant", "bench", "--role", "bench", "--keys-file", str(keys)]
    add = [PYTHON, "-m", "llmserve", "keys", "add", *who, "--pepper-file", str(pepper), "--json"]
    key = json.loads(subprocess.run(add, check=True, capture_output=True).stdout)["key"]
    engine = {"socket": str(folder / "engine.sock"), "model": {"driver": "echo"}}
    gateway = {
        "listen": {"socket": str(folder / "gateway.sock")},
        "metrics": {"socket": str(folder / "metrics.sock")},
        "engines": {"echo": {"socket": str(folder / "engine.sock")}},
        "keys_file": str(keys),
        "limits": {"waiting": 1000},
    }
    (folder / "engine.yaml").write_text(json.dumps(engine))  # JSON is YAML
    (folder / "gateway.yaml").write_text(json.dumps(gateway))
    serve = [PYTHON, "-m", "llmserve"]
    engine_command = [*serve, "engine", "--name", "echo", "--config", str(folder / "engine.yaml")]
    gateway_options = ["--config", str(folder / "gateway.yaml"), "--pepper-file", str(pepper)]
    uvicorn = [PYTHON, "-m", "uvicorn", "bare_asgi:app", "--app-dir", str(ROOT / "bench")]
    uvicorn_options = ["--uds", str(folder / "bare.sock"), "--no-access-log", "--log-level", "warning"]
    commands = [engine_command, [*serve, "gateway", *gateway_options], [*uvicorn, *uvicorn_options]]
    started = []
    with (folder / "log").open("wb") as log:
        os.sched_setaffinity(0, cores[0])  # children inherit it
        for command in commands:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        os.sched_setaffinity(0, cores[1])
        try:
            for name in "engine.sock", "gateway.sock", "bare.sock":
                await_socket(folder / name, folder / "log")
            time.sleep(1)  # the gateway finds its engine
            request = http_request(key)
            engine_id, gateway_id, bare_id = (process.pid for process in started)
            yield [
                Server("bare ASGI", folder / "bare.sock", request, [bare_id]),
                Server("gateway", folder / "gateway.sock", request, [gateway_id, engine_id]),
            ]
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(30)


def await_socket(path: Path, log: Path) -> None:
    """Until somebody listens there."""
    end = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody listens on {path}: {log.read_text()}")
        time.sleep(0.05)


def median(rounds: list[Round]) -> dict[str, float]:
    """The medians of several rounds, field by field."""
    fields = asdict(rounds[0])
    result = {name: statistics.median(asdict(each)[name] for each in rounds) for name in fields}
    return result | {"rate": statistics.median(each.rate for each in rounds)}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """For people, in Markdown."""
    lines = [
        "| connections | server | requests/s | CPU µs a request | engine's CPU µs | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for connections, by_server in results.items():
        for name, value in by_server.items():
            cells = [f"{value['rate']:.0f}", f"{value['cpu_us']:.0f}", f"{value['engine_cpu_us']:.0f}"]
            cells += [f"{value['p50_ms']:.2f}", f"{value['p99_ms']:.2f}"]
            lines.append(f"| {connections} | {name} | {' | '.join(cells)} |")
        bare, gateway = by_server["bare ASGI"], by_server["gateway"]
        lines.append(
            f"| {connections} | gateway / bare | {gateway['rate'] / bare['rate']:.2f} "
            f"| {gateway['cpu_us'] / bare['cpu_us']:.1f} | | {gateway['p50_ms'] / bare['p50_ms']:.1f} "
            f"| {gateway['p99_ms'] / bare['p99_ms']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server, in turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))
    cores = ({available[0]}, {available[-1]})
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as name, servers(Path(name), cores) as both:
        for connections in options.connections:
            rounds: dict[str, list[Round]] = {server.name: [] for server in both}
            for number in range(options.rounds):
                for server in both:
                    print(f"{connections} connections, round {number + 1}: {server.name}", file=sys.stderr)
                    rounds[server.name].append(measure(server, connections, options.seconds))
            results[str(connections)] = {name: median(each) for name, each in rounds.items()}
    print(json.dumps(results) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
