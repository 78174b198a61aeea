"""What benchmarks of the gateway share: its processes on one core, and on the other a client that asks without pause.

On a machine that does other work too, only CPU time and ratios of servers that are asked in turns are comparable.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(ROOT / "payload/.venv/bin/python")
QUESTION = {"model": "echo", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
PEPPER_BYTES = 32
START_SECONDS = 120.0
Address = Path | tuple[str, int]


@dataclass
class Round:
    """One measurement, or the medians of several. `rate` in requests a second; CPU in µs a request, by process."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]


@dataclass
class Server:
    """Where to ask, what, and whose CPU counts; the first process is the server itself.

    Each connection rests for `pause` seconds before each request.
    """

    name: str
    address: Address
    request: bytes
    processes: dict[str, int]
    pause: float = 0.0


class Connection(asyncio.Protocol):
    """Asks again as soon as the answer is there, and notes how long each took."""

    def __init__(self, server: Server, latencies: list[float], done: asyncio.Future[None]) -> None:
        """`latencies` in seconds, shared by all connections."""
        self.request = server.request
        self.pause = server.pause
        self.latencies = latencies
        self.done = done
        self.received = b""
        self.stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a stream socket was asked for")
        self.transport = transport
        self.next()

    def next(self) -> None:
        """After the pause, if there is one."""
        if self.pause:
            asyncio.get_running_loop().call_later(self.pause, self.ask)
        else:
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
            self.next()

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


async def connect(client: Connection, address: Address) -> None:
    """By a UNIX socket or by TCP."""
    loop = asyncio.get_running_loop()
    if isinstance(address, Path):
        await loop.create_unix_connection(partial(hand_over, client), str(address))
    else:
        await loop.create_connection(partial(hand_over, client), *address)


async def load(server: Server, connections: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of all requests of `connections` that ask one after the other, and how long it took."""
    latencies: list[float] = []
    clients, ends = [], []
    before = time.perf_counter()
    for _ in range(connections):
        done = asyncio.get_running_loop().create_future()
        client = Connection(server, latencies, done)
        await connect(client, server.address)
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


def measure(server: Server, connections: int, seconds: float) -> Round:
    """One round, after a short one that warms up."""
    asyncio.run(load(server, connections, 0.3))
    before = {name: cpu_seconds(process) for name, process in server.processes.items()}
    latencies, took = asyncio.run(load(server, connections, seconds))
    count = len(latencies)
    used = {name: cpu_seconds(process) - before[name] for name, process in server.processes.items()}
    cuts = statistics.quantiles(latencies, n=100)
    by_process = {name: cpu / count * 1e6 for name, cpu in used.items()}
    return Round(count / took, cuts[49] * 1e3, cuts[98] * 1e3, by_process)


def median(rounds: list[Round]) -> Round:
    """The medians of several rounds, number by number."""

    def of(numbers: Iterable[float]) -> float:
        return statistics.median(numbers)

    names = rounds[0].cpu_us
    return Round(
        of(each.rate for each in rounds),
        of(each.p50_ms for each in rounds),
        of(each.p99_ms for each in rounds),
        {name: of(each.cpu_us[name] for each in rounds) for name in names},
    )


def http_request(key: str, **more: object) -> bytes:
    """The question as bytes, with more fields."""
    body = json.dumps(QUESTION | more).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: llm",
        "content-type: application/json",
        f"authorization: Bearer {key}",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Stand:
    """A gateway's surroundings in one folder: key, signed policy, audit writer, engine, Redis. Use it in a `with`.

    The processes run on the first core, the caller on the last one.
    """

    def __init__(self, folder: Path) -> None:
        """Keys and policy are made here, processes are started by the methods."""
        self.folder = folder
        available = sorted(os.sched_getaffinity(0))
        self.cores = {available[0]}, {available[-1]}
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.redis: Path | None = None
        (folder / "pepper").write_bytes(os.urandom(PEPPER_BYTES))
        who = ["--subject", "bench", "--tenant", "bench", "--role", "developer"]
        files = ["--keys-file", str(folder / "keys.json"), "--pepper-file", str(folder / "pepper")]
        add = [PYTHON, "-m", "llmserve", "keys", "add", *who, *files, "--json"]
        self.key: str = json.loads(subprocess.run(add, check=True, capture_output=True).stdout)["key"]
        subprocess.run([PYTHON, ROOT / "bench/serving/signed_policy.py", folder], check=True)
        os.sched_setaffinity(0, self.cores[1])

    def __enter__(self) -> Self:
        """Nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """The gateways go first."""
        for process in reversed(self.started.values()):
            process.terminate()
            process.wait(30)

    def start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> int:
        """A process on the first core; its id."""
        with (self.folder / f"{name}.log").open("wb") as log:
            os.sched_setaffinity(0, self.cores[0])  # the child inherits it
            try:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=self.folder, env=os.environ | (environment or {})
                )
            finally:
                os.sched_setaffinity(0, self.cores[1])
        self.started[name] = process
        return process.pid

    def until(self, what: str, name: str, holds: Any) -> None:
        """Wait until `holds()`; raises RuntimeError with the log of the process `name` if it ends before."""
        end = time.monotonic() + START_SECONDS
        while not holds():
            if time.monotonic() > end or self.started[name].poll() is not None:
                log = (self.folder / f"{name}.log").read_text()
                raise RuntimeError(f"{what}: not so. {name} says at last: {log[-2000:]}")
            time.sleep(0.05)

    def start_redis(self) -> None:
        """Debian's redis-server, without a password; gateways that are started later use it."""
        self.redis = self.folder / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(self.redis), "--save", "", "--dir", str(self.folder)]
        self.start("Redis", ["redis-server", *options])
        self.until("Redis listens", "Redis", self.redis.exists)

    def start_writer(self) -> None:
        """`llm-audit serve`, the record's one writer."""
        (self.folder / "seed").write_text(os.urandom(32).hex())
        path = self.folder / "audit.sock"
        options = ["--folder", str(self.folder / "audit"), "--socket", str(path), "--name", "llm-audit/bench"]
        seed = ["--seed-file", str(self.folder / "seed")]
        self.start("audit writer", [PYTHON, "-m", "llmproof", "serve", *options, *seed])
        self.until("the audit writer listens", "audit writer", path.exists)

    def start_engine(self) -> None:
        """The `echo` engine."""
        config = {"socket": str(self.folder / "engine.sock"), "model": {"driver": "echo"}}
        (self.folder / "engine.yaml").write_text(json.dumps(config))  # JSON is YAML
        options = ["--name", "echo", "--config", str(self.folder / "engine.yaml")]
        self.start("engine", [PYTHON, "-m", "llmserve", "engine", *options])
        self.until("the engine listens", "engine", (self.folder / "engine.sock").exists)

    def gateway(
        self,
        name: str,
        program: list[str],
        port: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Server:
        """A gateway, started by `program`, as soon as it answers; on a UNIX socket, or on a port of 127.0.0.1."""
        address: Address = self.folder / f"{name}.sock" if port is None else ("127.0.0.1", port)
        config: dict[str, Any] = {
            "listen": {"socket": str(address)} if port is None else {"port": port},
            "metrics": {"socket": str(self.folder / f"{name}-metrics.sock")},
            "engines": {"echo": {"socket": str(self.folder / "engine.sock")}},
            "keys_file": str(self.folder / "keys.json"),
            "policy": {
                "engine": "embedded",
                "key": str(self.folder / "policy.pem"),
                "bundle": str(self.folder / "bundle.tar.gz"),
            },
            "audit": {"socket": str(self.folder / "audit.sock")},
            "limits": {"waiting": 1000},
        }
        if self.redis:  # on a busy machine 5 ms are not enough, and a Redis that rests would cost nothing
            config["redis"] = {"url": f"unix://{self.redis}", "deadline_ms": 200}
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps(config))
        options = ["--config", str(file), "--pepper-file", str(self.folder / "pepper")]
        process = self.start(name, [*program, "gateway", *options], environment)
        beside = {
            each: self.started[each].pid
            for each in ("engine", "audit writer", "Redis")
            if each in self.started
        }
        server = Server(name, address, http_request(self.key), {"itself": process} | beside)
        self.until_answered(server)
        return server

    def until_answered(self, server: Server) -> None:
        """Until a question is answered with 200."""
        self.until("it answers", server.name, lambda: answers(server))


def answers(server: Server) -> bool:
    """Whether a question is answered with 200."""
    family = socket.AF_UNIX if isinstance(server.address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(30)
        try:
            probe.connect(str(server.address) if isinstance(server.address, Path) else server.address)
            probe.sendall(server.request)
            return probe.recv(4096).startswith(b"HTTP/1.1 200")
        except OSError:
            return False
