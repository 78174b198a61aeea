#!/usr/bin/python3.13
"""The gateway beside its peers, LiteLLM's proxy and Portkey's gateway: CPU a request, CPU a cache hit, memory, start.

One worker each, on TCP, asked by the same client in turns. The gateway does all it does in production: key, policy,
quotas in Redis, metrics, access log, record on disk; its upstream is the `echo` engine. LiteLLM has its master key on
and its network mocked, so it talks to no upstream at all; no virtual keys, budgets or record. Its cache is the same
Redis. Portkey's gateway has no keys, quotas or record; its upstream is a bare ASGI application. CPU is that of a
server's process and its children; what it needs beside (audit writer, Redis) is told apart. An upstream's is not counted.

Needs `make env`, redis-server, and `make peers PEER="litellm portkey"`; a peer that is absent is said and left out.
Exit code 0, or 1 if a request failed.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plot
from stand import (
    PYTHON,
    ROOT,
    Round,
    Server,
    Stand,
    answers,
    cpu_seconds,
    first_bytes,
    free_port,
    http_request,
    in_turns,
    median,
    resident_mb,
    skip,
)

LITELLM = ROOT / "bench/.venv-litellm/bin/litellm"
PORTKEY = ROOT / "bench/peers/portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
UPSTREAM = ("engine",)  # of the gateway; the peers' is not counted either
GATEWAY, GATEWAY_HIT = "gateway", "gateway, cache hit"
PROXY, PROXY_HIT = "LiteLLM", "LiteLLM, cache hit"
BUDGETS = {(GATEWAY, PROXY): 20, (GATEWAY_HIT, PROXY_HIT): 40}  # so many times less CPU


@dataclass
class Footprint:
    """A server that has answered its first question: CPU seconds until then, and memory in MB."""

    start_cpu: float
    memory: float


def footprint(server: Server) -> Footprint:
    """Of the server itself, without what it needs beside."""
    process = server.processes["itself"]
    return Footprint(cpu_seconds(process), resident_mb(process))


def litellm(stand: Stand, name: str, settings: dict[str, Any]) -> Server:
    """LiteLLM's proxy with these settings, as soon as it answers."""
    key = "sk-" + os.urandom(32).hex()
    model = {"model": "openai/echo", "api_base": "http://127.0.0.1:9", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "echo", "litellm_params": model}],
        "litellm_settings": {"network_mock": True, "telemetry": False} | settings,
        "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY"},
    }
    file = stand.folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    environment = {
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "HOME": str(stand.folder),
    }
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    process = stand.start(name, [str(LITELLM), "--config", str(file), *options], environment)
    beside = {"Redis": stand.started["Redis"].pid} if "cache" in settings else {}
    server = Server(name, ("127.0.0.1", port), http_request(key), {"itself": process} | beside)
    stand.until_answered(server)
    return server


def portkey(stand: Stand) -> Server:
    """Portkey's gateway before a bare ASGI application, as soon as it answers."""
    upstream, port = free_port(), free_port()
    options = ["--port", str(upstream), "--app-dir", str(ROOT / "bench"), "--no-access-log"]
    stand.start("upstream", [PYTHON, "-m", "uvicorn", "bare_asgi:app", *options])
    process = stand.start("Portkey", ["node", str(PORTKEY), "--headless", f"--port={port}"])
    where = ("x-portkey-provider: openai", f"x-portkey-custom-host: http://127.0.0.1:{upstream}/v1")
    server = Server("Portkey", ("127.0.0.1", port), http_request("none", where), {"itself": process})
    stand.until_answered(server)
    return server


def hits(server: Server, name: str, request: bytes, header: bytes) -> Server:
    """The same server, asked what its cache knows; raises RuntimeError if it does not say so."""
    hit = replace(server, name=name, request=request, mark=header)
    first_bytes(hit)
    if header not in first_bytes(hit).lower():
        raise RuntimeError(f"{name}: an answer lacks `{header.decode()}`, so this compares no cache")
    return hit


def servers(stand: Stand) -> tuple[list[Server], dict[str, Footprint]]:
    """Those that can be had, and what each is before it has worked."""
    stand.start_redis()
    stand.start_writer()
    stand.start_engine()
    gateway = stand.gateway(GATEWAY, [PYTHON, "-m", "llmserve"], free_port())
    small = {GATEWAY: footprint(gateway)}
    found = [gateway]
    cached = [hits(gateway, GATEWAY_HIT, http_request(stand.key, temperature=0), b"x-llm-cache: hit")]
    if LITELLM.exists():
        proxy = litellm(stand, PROXY, {})
        small[PROXY] = footprint(proxy)
        found.append(proxy)
        redis = {"cache": True, "cache_params": {"type": "redis", "url": f"unix://{stand.redis}"}}
        keeper = litellm(stand, PROXY_HIT, redis)
        cached.append(hits(keeper, PROXY_HIT, keeper.request, b"x-litellm-cache-key"))
    else:
        skip("LiteLLM is not there: `make peers PEER=litellm` installs it")
    for server in found:
        if answers(replace(server, request=http_request("sk-" + os.urandom(32).hex()))):
            raise RuntimeError(f"{server.name} answers whoever asks, so this compares nothing")
    if PORTKEY.exists():
        found.append(portkey(stand))
        small["Portkey"] = footprint(found[-1])
    else:
        skip("Portkey's gateway is not there: `make peers PEER=portkey` installs it")
    return [*found, *cached], small


def own(measured: Round) -> float:
    """CPU µs a request of a server and what it needs beside, without its upstream."""
    return sum(cpu for name, cpu in measured.cpu_us.items() if name not in UPSTREAM)


def requests_table(results: dict[int, dict[str, list[Round]]]) -> str:
    """For people, in Markdown. Least: of the rounds, since other work only adds."""
    heads = ["connections", "server", "requests/s", "CPU µs a request (least)", "with what it needs beside"]
    heads += ["p50 ms", "p99 ms", "hits"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for connections, by_server in results.items():
        for name, rounds in by_server.items():
            each = median(rounds)
            least = min(one.cpu_us["itself"] for one in rounds)
            cells = [f"{each.rate:.0f}", f"{each.cpu_us['itself']:.0f} ({least:.0f})", f"{own(each):.0f}"]
            cells += [
                f"{each.p50_ms:.2f}",
                f"{each.p99_ms:.2f}",
                f"{each.marked:.0%}" if "hit" in name else "",
            ]
            lines.append(f"| {connections} | {name} | {' | '.join(cells)} |")
        for (ours, theirs), budget in BUDGETS.items():
            if theirs in by_server:
                less, more = median(by_server[ours]), median(by_server[theirs])
                cells = [
                    f"{less.rate / more.rate:.1f}",
                    f"1/{more.cpu_us['itself'] / less.cpu_us['itself']:.1f}",
                ]
                cells += [f"1/{own(more) / own(less):.1f}"]
                cells += [f"1/{more.p50_ms / less.p50_ms:.1f}", f"1/{more.p99_ms / less.p99_ms:.1f}", ""]
                lines.append(
                    f"| {connections} | {ours} / {theirs}, budget 1/{budget} | {' | '.join(cells)} |"
                )
    return "\n".join(lines)


def footprints_table(small: dict[str, Footprint]) -> str:
    """For people, in Markdown."""
    lines = ["| server | CPU s until its first answer | memory MB |", "|---|---|---|"]
    for name, each in small.items():
        lines.append(f"| {name} | {each.start_cpu:.2f} | {each.memory:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each server, in turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the tables")
    parser.add_argument("--plot", type=Path, help="an SVG of the CPU a request")
    options = parser.parse_args()
    load = f"{os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory(prefix="bench-proxies-") as folder, Stand(Path(folder)) as stand:
        asked, small = servers(stand)
        results = {
            connections: in_turns(asked, connections, options.rounds, options.seconds)
            for connections in options.connections
        }
    if options.json:
        rounds = {
            connections: {name: [vars(each) for each in rounds] for name, rounds in by_server.items()}
            for connections, by_server in results.items()
        }
        print(
            json.dumps({"rounds": rounds, "footprints": {name: vars(each) for name, each in small.items()}})
        )
    else:
        print(f"{requests_table(results)}\n\n{footprints_table(small)}")
    print(f"load average: {load} at the beginning, {os.getloadavg()[0]:.1f} at the end", file=sys.stderr)
    if options.plot:
        bars = {
            f"{connections} connections": {name: own(median(rounds)) for name, rounds in by_server.items()}
            for connections, by_server in results.items()
        }
        plot.draw(options.plot, "CPU a request, with what a server needs beside", "µs", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
