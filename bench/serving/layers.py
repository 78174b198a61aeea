"""Measures each layer of the gateway's access control by itself, called as in the gateway; JSON on stdout.

Run by bench/access.py, which has made the folder in the first argument: keys, policy, and the sockets of the audit
writer and, where these run, of OPA and Redis. Times are of the whole call in the event loop, CPU is this process'.
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import uvloop
from llmserve.access.api_keys import KeyTable
from llmserve.access.decision import Decision
from llmserve.access.identity import Authenticator, Identity
from llmserve.access.opa import OpaEmbedded, OpaServer
from llmserve.access.policy import Policy
from llmserve.access.quotas import Quotas
from llmserve.asgi import Exchange
from llmserve.audit.recorder import Recorder
from llmserve.audit.writer_client import AuditClient
from llmserve.metrics import Metrics
from llmserve.redis_client import RedisClient
from llmserve.settings import Redis

ACTION = "POST /v1/chat/completions"
PROMPT = '[{"role":"user","content":"What is the capital of France?"}]'
Call = Callable[[], Awaitable[object]]


def row(name: str, nanoseconds: list[int], cpu: float) -> dict[str, object]:
    """One line of the result; `cpu` in seconds of this process, for all of them."""
    cuts = statistics.quantiles(nanoseconds, n=100)
    each = cpu / len(nanoseconds) * 1e6
    return {"name": name, "p50_us": cuts[49] / 1e3, "p99_us": cuts[98] / 1e3, "cpu_us": each}


async def timed(name: str, number: int, call: Call) -> dict[str, object]:
    """NUMBER calls, one after the other."""
    for _ in range(max(10, number // 20)):
        await call()
    taken = []
    before = time.process_time()
    for _ in range(number):
        began = time.perf_counter_ns()
        await call()
        taken.append(time.perf_counter_ns() - began)
    return row(name, taken, time.process_time() - before)


async def intents(recorder: Recorder, exchange: Exchange, writers: int, number: int) -> dict[str, object]:
    """NUMBER intents by so many writers at once, each of which waits for the disk before its next one."""
    taken = []

    async def write() -> None:
        for _ in range(number // writers):
            began = time.perf_counter_ns()
            await recorder.intent(exchange, "echo", PROMPT, recorder.proof(PROMPT))
            taken.append(time.perf_counter_ns() - began)

    before = time.process_time()
    await asyncio.gather(*(write() for _ in range(writers)))
    return row(f"audit intent on disk, {writers} at once", taken, time.process_time() - before)


async def opened(engine: OpaEmbedded | OpaServer) -> None:
    """Until it decides."""
    async with asyncio.timeout(30):
        policy = Policy(engine, Metrics(), None, None)
        while not policy.ready:
            await policy.probe()
            await asyncio.sleep(0.05)


async def decisions(identity: Identity, folder: Path) -> tuple[list[dict[str, object]], Decision]:
    """Kept, embedded, and by OPA where it runs."""
    embedded = OpaEmbedded(folder / "bundle.tar.gz", (folder / "policy.pem").read_bytes())
    policy = Policy(embedded, Metrics(), None, None)
    decision = await policy.decide(identity, ACTION)
    assert decision.allow, decision
    rows = [await timed("decision, kept", 50_000, lambda: policy.decide(identity, ACTION))]
    rows.append(await timed("decision, embedded OPA", 3000, lambda: policy.fresh(identity, ACTION)))
    if (folder / "opa.sock").exists():
        server = OpaServer(folder / "opa.sock", 1000)
        await opened(server)
        asked = Policy(server, Metrics(), None, None)
        rows.append(
            await timed("decision, OPA by its UNIX socket", 3000, lambda: asked.fresh(identity, ACTION))
        )
        server.close()
    return rows, decision


async def quotas(decision: Decision, folder: Path) -> list[dict[str, object]]:
    """A request and its tokens, with what is leased already, and with leases to fetch."""
    redis = folder / "redis.sock"
    client = RedisClient(Redis(url=f"unix://{redis}", deadline_ms=1000), None) if redis.exists() else None
    counted = Quotas(client, Metrics())

    async def take(subject: str = "bench") -> None:
        await counted.request("bench", subject, decision)
        reserved = await counted.reserve("bench", subject, decision, 64)
        reserved.settle(20)

    rows = [await timed("quotas of a request, leased already", 20_000, take)]
    if client:
        strangers = (f"stranger-{number}" for number in count())
        called = "quotas of a request, three leases from Redis"
        rows.append(await timed(called, 1000, lambda: take(next(strangers))))
        await client.close()
    return rows


async def records(
    identity: Identity, decision: Decision, folder: Path, pepper: bytes
) -> list[dict[str, object]]:
    """Intents."""
    writer = AuditClient(folder / "audit.sock", Metrics())
    recorder = Recorder(writer, pepper)
    connection = asyncio.create_task(writer.keep_connected())
    while not writer.up:
        await asyncio.sleep(0.01)
    name = b"0190c8a17b1e7cc080003d1f0a5b7e21"
    exchange = Exchange(
        name, name, False, time.monotonic(), identity=identity, action=ACTION, decision=decision
    )
    rows = [
        await intents(recorder, exchange, writers, number)
        for writers, number in ((1, 1000), (16, 8000), (64, 16000))
    ]
    connection.cancel()
    return rows


async def main(folder: Path, key: str) -> None:
    """All of them."""
    pepper = (folder / "pepper").read_bytes()
    authenticator = Authenticator(KeyTable(folder / "keys.json", pepper))
    headers = [
        (b"host", b"llm"),
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer " + key.encode()),
    ]

    async def identify() -> Identity:
        return authenticator.identify(headers)

    identity = await identify()
    rows = [await timed("authentication by API key", 20_000, identify)]
    decided, decision = await decisions(identity, folder)
    rows += decided
    rows += await quotas(decision, folder)
    rows += await records(identity, decision, folder, pepper)
    print(json.dumps(rows))


uvloop.run(main(Path(sys.argv[1]), sys.stdin.readline().strip()))
