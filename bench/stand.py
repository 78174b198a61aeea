"""Code shared by the gateway's benchmarks: its processes on one core, and on the other a client that sends requests without
pause.

On a machine that does other work, only CPU time and ratios of servers that are queried in turns are comparable.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
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
START_SECONDS = 600.0  # a peer needs minutes on a busy machine
Address = Path | tuple[str, int]


@dataclass
class Round:
    """One measurement, or the medians of several. `rate` in requests a second; CPU in µs a request, or an event of a stream,
    by process.

    `marked`: the share of the answers that bear the server's mark.
    """

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]
    marked: float = 1.0


@dataclass
class Server:
    """Where to ask, what, and whose CPU counts, that of their children included; the first is the server itself.

    Each connection rests for `pause` seconds before each request. `mark`, in lower case, is in the headers of an answer
    that came as it should, from a cache say. `events`: of each answer, if it is a stream.
    """

    name: str
    address: Address
    request: bytes
    processes: dict[str, int]
    pause: float = 0.0
    mark: bytes = b""
    events: int = 1


class Connection(asyncio.Protocol):
    """Asks again as soon as the answer is there, and notes how long each took."""

    def __init__(self, server: Server, latencies: list[float], done: asyncio.Future[None]) -> None:
        """`latencies` in seconds, shared by all connections."""
        self.request = server.request
        self.pause = server.pause
        self.mark = server.mark
        self.marked = 0
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
        if blank and whole(head, body):
            self.received = b""
            self.answered(head)

    def answered(self, head: bytes) -> None:
        """All of an answer is there."""
        if not head.startswith(b"HTTP/1.1 200"):
            self.fail(RuntimeError(f"not answered: {head!r}"))
            return
        self.latencies.append(time.perf_counter() - self.asked)
        self.marked += self.mark in head.lower()
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


def whole(head: bytes, body: bytes) -> bool:
    """Whether nothing of an answer's body is missing."""
    _, counted, length = head.lower().partition(b"content-length:")
    if counted:
        return len(body) >= int(length.split(b"\r\n", 1)[0])
    return body.endswith(b"\r\n0\r\n\r\n")  # in chunks


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


async def load(server: Server, connections: int, seconds: float) -> tuple[list[float], float, int]:
    """All requests of `connections` that ask one after the other: latencies, how long it took, how many were marked."""
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
    return latencies, time.perf_counter() - before, sum(client.marked for client in clients)


def process_tree(process: int) -> list[Path]:
    """A process and its children's children, in /proc."""
    children = [
        int(child)
        for thread in Path(f"/proc/{process}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return [Path(f"/proc/{process}"), *(each for child in children for each in process_tree(child))]


def scheduled(process: int, column: int) -> float:
    """Seconds of all threads of `process` and its children, from the scheduler's own nanoseconds."""
    threads = (thread for each in process_tree(process) for thread in (each / "task").iterdir())
    return sum(int((thread / "schedstat").read_text().split()[column]) for thread in threads) / 1e9


def cpu_seconds(process: int) -> float:
    """The time that it has run."""
    return scheduled(process, 0)


def core_wait_seconds(process: int) -> float:
    """The time that it waited for a core."""
    return scheduled(process, 1)


def resident_mb(process: int) -> float:
    """Memory of `process` and its children, MB; what they share counts once for each."""
    found = ((each / "status").read_text().partition("VmRSS:")[2] for each in process_tree(process))
    return sum(int(text.split()[0]) for text in found) * 1024 / 1e6


def measure(server: Server, connections: int, seconds: float) -> Round:
    """One round, after a short one that warms up."""
    asyncio.run(load(server, connections, 0.3))
    before = {name: cpu_seconds(process) for name, process in server.processes.items()}
    latencies, took, marked = asyncio.run(load(server, connections, seconds))
    count = len(latencies)
    used = {name: cpu_seconds(process) - before[name] for name, process in server.processes.items()}
    cuts = statistics.quantiles(latencies, n=100)
    by_process = {name: cpu / (count * server.events) * 1e6 for name, cpu in used.items()}
    return Round(count / took, cuts[49] * 1e3, cuts[98] * 1e3, by_process, marked / count)


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
        of(each.marked for each in rounds),
    )


def in_turns(servers: list[Server], connections: int, rounds: int, seconds: float) -> dict[str, list[Round]]:
    """All rounds of all servers. The order is reversed each time, so that a growing load favours none of them."""
    measured: dict[str, list[Round]] = {server.name: [] for server in servers}
    for number in range(rounds):
        print(f"{connections} connections, round {number + 1} of {rounds}", file=sys.stderr)
        for server in servers[:: 1 if number % 2 == 0 else -1]:
            measured[server.name].append(measure(server, connections, seconds))
    return measured


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def skip(what: str) -> None:
    """Print a message."""
    print(f"SKIPPED: {what}", file=sys.stderr, flush=True)


def http_request(key: str, headers: tuple[str, ...] = (), **more: object) -> bytes:
    """The question as bytes, with more headers and fields."""
    body = json.dumps(QUESTION | more).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: llm",
        "content-type: application/json",
        f"authorization: Bearer {key}",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Stand:
    """A gateway's surroundings in one folder: key, signed policy, audit writer, engine, Redis. Use it in a `with`.

    The processes run on the first core, the caller on the last one; or all wherever they like.
    """

    def __init__(self, folder: Path, pinned: bool = True) -> None:
        """Keys and policy are made here, processes are started by the methods."""
        self.folder = folder
        available = sorted(os.sched_getaffinity(0))
        self.cores = ({available[0]}, {available[-1]}) if pinned else (set(available), set(available))
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

    def start_engine(self, name: str = "echo", **model: Any) -> None:
        """The `echo` engine, or as `model` describes it."""
        described = {"driver": "echo"} | model
        config = {"socket": str(self.folder / "engine.sock"), "model": described}
        (self.folder / "engine.yaml").write_text(json.dumps(config))  # JSON is YAML
        options = ["--name", name, "--config", str(self.folder / "engine.yaml")]
        self.start("engine", [PYTHON, "-m", "llmserve", "engine", *options])
        self.until("the engine listens", "engine", (self.folder / "engine.sock").exists)

    def gateway(
        self,
        name: str,
        program: list[str],
        port: int | None = None,
        environment: dict[str, str] | None = None,
        **more: Any,
    ) -> Server:
        """A gateway, started by `program`, as soon as it answers; on a UNIX socket, or on a port of 127.0.0.1.

        `more`: its configuration, where it is another one.
        """
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
        config |= more
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps(config))
        options = ["--config", str(file), "--pepper-file", str(self.folder / "pepper")]
        process = self.start(name, [*program, "gateway", *options], environment)
        beside = {
            each: self.started[each].pid
            for each in ("engine", "audit writer", "Redis")
            if each in self.started
        }
        request = http_request(self.key, model=next(iter(config["engines"])))
        server = Server(name, address, request, {"itself": process} | beside)
        self.until_answered(server)
        return server

    def until_answered(self, server: Server) -> None:
        """Until a question is answered with 200."""
        self.until("it answers", server.name, lambda: answers(server))


def answers(server: Server) -> bool:
    """Whether a question is answered with 200."""
    return first_bytes(server).startswith(b"HTTP/1.1 200")


def first_bytes(server: Server) -> bytes:
    """Of an answer: its status and headers. Nothing if there is none."""
    family = socket.AF_UNIX if isinstance(server.address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(30)
        try:
            probe.connect(str(server.address) if isinstance(server.address, Path) else server.address)
            probe.sendall(server.request)
            return probe.recv(4096)
        except OSError:
            return b""
