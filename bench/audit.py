#!/usr/bin/python3.13
"""Measures the cost of the audit record: records per second, each on disk before it is acknowledged, and CPU per record.

Writers send one record after the other over the socket and wait for each acknowledgement, as requests do: first all of them on
one connection, like a gateway's requests, then each on its own connection. The service runs on the first core, the writers on the
last one. `bare fdatasync` is the disk alone: one process that repeatedly appends a record's bytes and syncs.

Needs nothing but `make env`. Exit code 0, or 1 if a record was refused or the record does not verify.
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
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / ".venv/bin/python")
EVENT = {
    "event.kind": "event",
    "event.category": ["api"],
    "event.action": "POST /v1/chat/completions",
    "event.type": ["access"],
    "event.outcome": "success",
    "llmkeep.audit.phase": "outcome",
    "http.request.id": "0190c8a1-7b1e-7cc0-8000-3d1f0a5b7e21",
    "http.request.method": "POST",
    "url.path": "/v1/chat/completions",
    "http.response.status_code": 200,
    "event.duration": 123456789,
    "user.id": "alice@corp",
    "user.roles": ["developer"],
    "organization.id": "corp",
    "llmkeep.identity.kind": "api_key",
    "llmkeep.identity.id": "k7f3a9",
    "llmkeep.decision.id": "0190c8a1-7b1e-7cc0-8000-3d1f0a5b7e22",
    "llmkeep.decision.rule": "roles/developer",
    "llmkeep.decision.revision": 7,
    "gen_ai.request.model": "smollm2-135m-instruct",
    "gen_ai.usage.input_tokens": 31,
    "gen_ai.usage.output_tokens": 128,
    "llmkeep.prompt.hmac": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
}
BODY = json.dumps(EVENT)


@dataclass
class Round:
    """One measurement. `cpu_us`: microseconds of the service's CPU a record."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


class Connection(asyncio.Protocol):
    """Keeps `writers` records in flight; each acknowledgement releases the next ones."""

    transport: asyncio.Transport

    def __init__(self, writers: int, latencies: list[float], done: asyncio.Future[None]) -> None:
        """`latencies` in seconds, shared by all connections."""
        self.writers, self.latencies, self.done = writers, latencies, done
        self.number, self.stopping = 0, False
        self.sent: deque[float] = deque()
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a UNIX stream socket was asked for")
        self.transport = transport
        self.hand_in(self.writers)

    def hand_in(self, count: int) -> None:
        """COUNT more."""
        first, self.number = self.number + 1, self.number + count
        self.sent.extend([time.perf_counter()] * count)
        lines = [f'{{"n": {number}, "event": {BODY}}}\n' for number in range(first, self.number + 1)]
        self.transport.write("".join(lines).encode())

    def data_received(self, data: bytes) -> None:
        """Acknowledgements."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        now = time.perf_counter()
        for line in lines:
            if not line.isdigit():
                self.end(RuntimeError(f"not written: {line.decode()}"))
                return
            covered = int(line) - (self.number - len(self.sent))
            self.latencies.extend(now - self.sent.popleft() for _ in range(covered))
            if not self.stopping:
                self.hand_in(covered)
        if self.stopping and not self.sent:
            self.end(None)

    def end(self, error: Exception | None) -> None:
        """Tell `load`."""
        if not self.done.done():
            if error:
                self.done.set_exception(error)
            else:
                self.done.set_result(None)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Before the end, this is a failure."""
        self.end(exc or RuntimeError("the service has closed the connection"))


def hand_over(client: Connection) -> Connection:
    """A protocol factory for one connection."""
    return client


async def load(path: Path, writers: int, connections: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of all records, and the duration."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    clients = [
        Connection(writers // connections, latencies, loop.create_future()) for _ in range(connections)
    ]
    before = time.perf_counter()
    for client in clients:
        await loop.create_unix_connection(partial(hand_over, client), str(path))
    await asyncio.wait(
        [client.done for client in clients], timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
    )
    for client in clients:
        client.stopping = True
    async with asyncio.timeout(30):
        await asyncio.gather(*(client.done for client in clients))
    return latencies, time.perf_counter() - before


def cpu_seconds(process: int) -> float:
    """CPU time of all threads of `process`, from the scheduler's own nanoseconds."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def measure(path: Path, process: int, writers: int, connections: int, seconds: float) -> Round:
    """One round."""
    before = cpu_seconds(process)
    latencies, took = asyncio.run(load(path, writers, connections, seconds))
    cpu = (cpu_seconds(process) - before) / len(latencies) * 1e6
    cuts = statistics.quantiles(latencies, n=100)
    return Round(len(latencies) / took, cuts[49] * 1e3, cuts[98] * 1e3, cpu)


def bare(folder: Path, seconds: float) -> float:
    """Synced appends a second of one process, nothing else."""
    descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        os.write(descriptor, BODY.encode())
        os.fdatasync(descriptor)
        count += 1
    os.close(descriptor)
    return count / seconds


def median(rounds: list[Round]) -> dict[str, float]:
    """The medians of several rounds, field by field."""
    return {name: statistics.median(asdict(each)[name] for each in rounds) for name in asdict(rounds[0])}


def table(results: dict[str, dict[str, float]], alone: float) -> str:
    """The results in Markdown."""
    lines = [
        "| writers | connections | records/s | CPU µs a record | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in results.items():
        cells = [
            f"{value['rate']:.0f}",
            f"{value['cpu_us']:.0f}",
            f"{value['p50_ms']:.2f}",
            f"{value['p99_ms']:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"\nbare fdatasync, one process: {alone:.0f} a second"])


def run(options: argparse.Namespace, folder: Path) -> int:
    """Measure, print and verify."""
    available = sorted(os.sched_getaffinity(0))
    (folder / "seed").write_text(os.urandom(32).hex())
    path = folder / "audit.sock"
    command = [PYTHON, "-m", "llmproof", "serve", "--folder", str(folder / "record"), "--socket", str(path)]
    os.sched_setaffinity(0, {available[0]})  # the child inherits it
    service = subprocess.Popen([*command, "--seed-file", str(folder / "seed"), "--name", "llm-audit/bench"])
    os.sched_setaffinity(0, {available[-1]})
    results: dict[str, dict[str, float]] = {}
    try:
        end = time.monotonic() + 30
        while not path.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"nobody listens on {path}")
            time.sleep(0.05)
        asyncio.run(load(path, 16, 1, 0.5))  # warm
        for writers in options.writers:
            for connections in sorted({1, writers}):
                print(f"{writers} writers on {connections} connections", file=sys.stderr)
                rounds = [
                    measure(path, service.pid, writers, connections, options.seconds)
                    for _ in range(options.rounds)
                ]
                results[f"{writers} | {connections}"] = median(rounds)
    finally:
        service.terminate()
        service.wait(30)
    alone = bare(folder, options.seconds)
    print(json.dumps({"bare": alone, "service": results}) if options.json else table(results, alone))
    verify = [PYTHON, "-m", "llmproof", "verify", str(folder / "record")]
    began = time.perf_counter()
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    print(f"verified in {time.perf_counter() - began:.1f} s: {done.stdout.strip()}", file=sys.stderr)
    return int(done.returncode != 0)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each number of writers")
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the temporary folder's)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-audit-", dir=options.folder) as name:
        return run(options, Path(name))


if __name__ == "__main__":
    sys.exit(main())
