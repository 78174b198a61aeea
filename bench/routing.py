#!/usr/bin/python3.13
"""Measures how well the choice of an engine uses the engines' prefix caches: the gateway compared with vllm-router and
sglang-router.

Each routes the same traffic, in turns, to the same four simulated engines (simulated_engine.py says what they model), whose
caches are emptied before each turn. The gateway is two processes, as on a host, and each request goes to one of them at random;
each knows only its own requests. It is also measured as one process. Everything is enabled (key, policy in process, record on
disk), without Redis. A router is one process, with its defaults.

| traffic | |
|---|---|
| chats | users with pauses; each turn sends the whole conversation, whose first question is long |
| prompts | short questions after one of 48 long system prompts, which come at a fixed rate; a few prompts have most of them |
| hot | many questions at once after the same long document, beside chats |
| slow | chats, while one engine takes four times as long for everything |

Measured for each: the share of prompt tokens that was cached, as counted by the engines; the time to first token, as seen by the
client; the busiest engine's requests compared with the average; and cached tokens that another tenant's request had computed,
through which a tenant could learn about another's requests. All tenants' system messages begin alike. Routers do not know
tenants.

Needs `make env` and `make peers PEER=routers`. Exit code 0, or 1 if a request failed.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from gateway import installed
from simulated_engine import MODEL
from stand import PYTHON, ROOT, Server, Stand, free_port, http_request

ENGINES = 4
GATEWAYS = 2
SLOWNESS = 4.0
TENANTS = 8
PROMPTS = 48
PROMPT_TOKENS = 2000
DOCUMENT_TOKENS = 3000
HOUSE_RULES = " ".join(f"rule{number}" for number in range(64))  # of all tenants
WORDS = [f"{first}{last}" for first in ("ba", "ke", "li", "mo", "su", "ta") for last in "bdfgklmnprst"]
PEERS = {
    "vllm-router, cache_aware": ("vllm-router", "cache_aware"),
    "vllm-router, power_of_two": ("vllm-router", "power_of_two"),
    "sglang-router, cache_aware": ("sglang-router", "cache_aware"),
}
Messages = list[dict[str, str]]


@dataclass
class Target:
    """A measured target: equivalent addresses, and the API key of each tenant."""

    name: str
    ports: list[int]
    keys: list[str]


@dataclass
class Result:
    """One server under one traffic. Times in milliseconds; `imbalance`: of the busiest engine's requests to the average."""

    requests: int
    failed: int
    hit_rate: float
    p50_ms: float
    p99_ms: float
    imbalance: float
    foreign_tokens: int


@dataclass
class Client:
    """Sends requests to one target. `seconds`: to the first token, of each answer."""

    target: Target
    chance: random.Random
    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    idle: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = field(default_factory=dict)

    async def ask(self, tenant: int, messages: Messages, length: int) -> str:
        """Stream one answer of `length` tokens; returns its text, which is empty if it failed."""
        body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": length, "stream": True}
        request = http_request(self.target.keys[tenant], **body)
        port = self.chance.choice(self.target.ports)
        begun = time.perf_counter()
        connections = self.idle.setdefault(port, [])
        reader, writer = (
            connections.pop() if connections else await asyncio.open_connection("127.0.0.1", port)
        )
        try:
            writer.write(request)
            received, first = b"", 0.0
            while not received.endswith(b"0\r\n\r\n"):
                if not (data := await reader.read(65536)):
                    raise OSError("the connection has ended")
                received += data
                if not first and b'"content":"w' in received:
                    first = time.perf_counter() - begun
                if b"\r\n\r\n" in received and not received.startswith(b"HTTP/1.1 200"):
                    raise OSError(received[:300])
            events = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: {")]
        except (OSError, ValueError) as error:
            print(f"{self.target.name}: {error}", file=sys.stderr)
            self.failed += 1
            writer.close()
            return ""
        connections.append((reader, writer))
        self.seconds.append(first)
        return "".join(choice["delta"].get("content") or "" for each in events for choice in each["choices"])

    def close(self) -> None:
        """Close all connections."""
        for connections in self.idle.values():
            for _, writer in connections:
                writer.close()


def words(chance: random.Random, count: int) -> str:
    """A text of `count` tokens."""
    return " ".join(chance.choices(WORDS, k=count))


async def chat(client: Client, seed: str, end: float) -> None:
    """One user: conversations of some turns, with pauses."""
    chance = random.Random(seed)  # noqa: S311 - traffic
    tenant = chance.randrange(TENANTS)
    rules = words(random.Random(f"{seed.partition('/')[0]} {tenant}"), 192)  # noqa: S311
    number = 0
    await asyncio.sleep(chance.uniform(0, 3))
    while time.monotonic() < end:
        messages = [{"role": "system", "content": f"{client.target.name} {HOUSE_RULES} {rules}"}]
        number += 1
        for turn in range(chance.randint(3, 9)):
            length = chance.randint(400, 1600) if turn == 0 else chance.randint(20, 120)
            question = f"tenant{tenant}/{seed}/{number}/{turn} {words(chance, length)}"
            messages.append({"role": "user", "content": question})
            answer = await client.ask(tenant, messages, chance.randint(12, 40))
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(chance.expovariate(1 / 1.2))
            if time.monotonic() > end or not answer:
                break


async def at_a_rate(
    client: Client,
    seed: str,
    end: float,
    rate: float,
    question: Callable[[random.Random], tuple[int, Messages]],
) -> None:
    """Requests that come whether or not earlier ones are answered."""
    chance = random.Random(seed)  # noqa: S311 - traffic
    async with asyncio.TaskGroup() as group:
        while time.monotonic() < end:
            await asyncio.sleep(chance.expovariate(rate))
            tenant, messages = question(chance)
            group.create_task(client.ask(tenant, messages, chance.randint(12, 40)))


def after_a_prompt(name: str, seed: str) -> Callable[[random.Random], tuple[int, Messages]]:
    """Questions after one of the system prompts; the n-th most frequent one has a share of 1/n."""
    source = random.Random(seed)  # noqa: S311 - traffic
    prompts = [f"{name} {HOUSE_RULES} {words(source, PROMPT_TOKENS)}" for _ in range(PROMPTS)]
    shares = [1 / (place + 1) for place in range(PROMPTS)]

    def question(chance: random.Random) -> tuple[int, Messages]:
        number = chance.choices(range(PROMPTS), shares)[0]
        tenant = number % TENANTS
        text = f"tenant{tenant}/{chance.random()} {words(chance, chance.randint(15, 40))}"
        return tenant, [{"role": "system", "content": prompts[number]}, {"role": "user", "content": text}]

    return question


def about_a_document(name: str, seed: str) -> Callable[[random.Random], tuple[int, Messages]]:
    """Second turns of the same conversation."""
    document = words(random.Random(seed), DOCUMENT_TOKENS)  # noqa: S311 - traffic

    def question(chance: random.Random) -> tuple[int, Messages]:
        return 0, [
            {"role": "user", "content": f"{name} {document}"},
            {"role": "assistant", "content": "w1 w2 w3"},
            {"role": "user", "content": f"tenant0/{chance.random()} {words(chance, chance.randint(15, 40))}"},
        ]

    return question


def chats(client: Client, seed: str, end: float, users: int) -> list[Coroutine[Any, Any, None]]:
    """Several users."""
    return [chat(client, f"{seed}/{user}", end) for user in range(users)]


def traffic(name: str, client: Client, seed: str, end: float) -> list[Coroutine[Any, Any, None]]:
    """What runs at once until `end`. All targets get the same requests, but for their names in the first message, by which no
    router mistakes them for those of an earlier turn.
    """
    target = client.target.name
    if name == "prompts":
        return [at_a_rate(client, seed, end, 60, after_a_prompt(target, seed))]
    if name == "hot":
        return [
            at_a_rate(client, seed, end, 30, about_a_document(target, seed)),
            *chats(client, seed, end, 48),
        ]
    return chats(client, seed, end, 48 if name == "slow" else 80)


TRAFFIC = ("chats", "prompts", "hot", "slow")


def reset(port: int, slowness: list[float]) -> list[dict[str, int]]:
    """Empty the engines' caches; returns their counts until now."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/reset", json.dumps(slowness).encode())
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        counts: list[dict[str, int]] = json.load(response)
    return counts


def measure(target: Target, name: str, engines: list[int], seed: int, seconds: float) -> Result:
    """One turn."""
    slowest = [1.0] * (ENGINES - 1) + [SLOWNESS if name == "slow" else 1.0]
    reset(engines[0], slowest)
    client = Client(target, random.Random(seed))  # noqa: S311 - traffic

    async def turn() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*traffic(name, client, f"{name} {seed}", end))
        client.close()

    asyncio.run(turn())
    counts = reset(engines[0], slowest)
    cuts = quantiles(client.seconds, n=100, method="inclusive")
    requests = [each["requests"] for each in counts]
    return Result(
        len(client.seconds),
        client.failed,
        sum(each["cached"] for each in counts) / sum(each["prompt"] for each in counts),
        cuts[49] * 1e3,
        cuts[98] * 1e3,
        max(requests) / mean(requests),
        sum(each["foreign"] for each in counts),
    )


def key_of(stand: Stand, tenant: str) -> str:
    """A new API key."""
    who = ["--subject", tenant, "--tenant", tenant, "--role", "developer", "--json"]
    files = ["--keys-file", str(stand.folder / "keys.json"), "--pepper-file", str(stand.folder / "pepper")]
    command = [PYTHON, "-m", "llmserve", "keys", "add", *who, *files]
    key: str = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["key"]
    return key


def start_gateways(
    stand: Stand, engines: list[int], label: str, environment: dict[str, str] | None
) -> Target:
    """Two gateways of the same engines."""
    keys = [key_of(stand, f"tenant{number}") for number in range(TENANTS)]
    urls = [f"http://127.0.0.1:{port}" for port in engines]
    remote = {"url": urls, "revision": "1", "slots": 64}
    more = {
        "engines": {MODEL: {"remote": remote}},
        "limits": {"waiting": 1000, "tenant_share": 1.0, "subject_share": 1.0},
    }
    ports = [free_port() for _ in range(GATEWAYS)]
    for number, port in enumerate(ports):
        stand.gateway(f"{label} {number + 1}", [PYTHON, "-m", "llmserve"], port, environment, **more)
    return Target(label, ports, keys)


def start_router(stand: Stand, name: str, engines: list[int]) -> Target:
    """A router, as soon as it answers."""
    program, policy = PEERS[name]
    port = free_port()
    command = [str(ROOT / f"bench/.venv-routers/bin/{program}")]
    command += ["launch"] if program == "sglang-router" else []
    urls = [f"http://127.0.0.1:{each}" for each in engines]
    options = ["--worker-urls", *urls, "--policy", policy, "--host", "127.0.0.1", "--port", str(port)]
    options += ["--prometheus-port", str(free_port()), "--log-level", "error"]
    if program == "sglang-router":
        options += ["--shutdown-grace-period-secs", "1"]
    process = stand.start(name, [*command, *options])
    request = http_request("none", model=MODEL, max_tokens=1)
    stand.until_answered(Server(name, ("127.0.0.1", port), request, {"itself": process}))
    return Target(name, [port], ["none"] * TENANTS)


def table(results: dict[str, dict[str, Result]]) -> str:
    """The results in Markdown."""
    heads = ["traffic", "server", "requests", "hit rate", "TTFT p50 ms", "p99 ms", "busiest engine"]
    heads += ["tokens of other tenants"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, by_target in results.items():
        for target, each in by_target.items():
            cells = [name, target, str(each.requests), f"{each.hit_rate:.1%}", f"{each.p50_ms:.0f}"]
            cells += [f"{each.p99_ms:.0f}", f"{each.imbalance:.2f}", str(each.foreign_tokens)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a turn")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic")
    parser.add_argument("--traffic", nargs="+", choices=TRAFFIC, default=TRAFFIC)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="its gateway too, in the same turns")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    results: dict[str, dict[str, Result]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-routing-") as folder,
        Stand(Path(folder), pinned=False) as stand,
    ):
        ports = [free_port() for _ in range(ENGINES)]
        program = [PYTHON, str(ROOT / "bench/simulated_engine.py"), "--ports", *map(str, ports)]
        stand.start("engines", program)
        stand.start_writer()
        targets = [start_gateways(stand, ports, "gateway", None)]
        targets.append(replace(targets[0], name="gateway, one process", ports=targets[0].ports[:1]))
        if options.before:
            environment = {"PYTHONPATH": f"{options.before.resolve()}:{options.before.resolve()}/payload"}
            targets.append(start_gateways(stand, ports, "gateway before", environment))
        targets += [
            start_router(stand, name, ports) for name, (router, _) in PEERS.items() if installed(router)
        ]
        for name in options.traffic:
            results[name] = {}
            for target in targets:
                results[name][target.name] = measure(target, name, ports, options.seed, options.seconds)
                print(f"{name}, {target.name}: {results[name][target.name]}", file=sys.stderr)
    if options.json:
        described = {
            name: {each: asdict(value) for each, value in by.items()} for name, by in results.items()
        }
        print(json.dumps(described))
    else:
        print(table(results))
    return int(any(each.failed for by in results.values() for each in by.values()))


if __name__ == "__main__":
    sys.exit(main())
