#!/usr/bin/python3.13
"""Measures the cost of the gateway: requests per second, CPU per request, p50 and p99, compared with a bare ASGI application.

Both are served by uvicorn (uvloop, httptools, one worker) on a UNIX socket, and measured in turns in the same run, since only
ratios are comparable on a machine that does other work. The gateway does everything that it does in production: request id, body
limit, key, policy (embedded, on a signed bundle), quotas, admission, metrics, access log, and an intent on disk before each
answer. The `echo` engine, the audit writer and Redis are processes of their own.

With --remote also the path to a server of OpenAI's API (scripted_api.py): whole answers and streams, beside vllm-router and
sglang-router, which route between such servers in Rust, without users, quotas or a record.

Needs nothing but `make env`, and for the routers `make peers PEER=routers`. Exit code 0, or 1 if a request failed.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from scripted_api import EVENTS
from stand import PYTHON, ROOT, Round, Server, Stand, free_port, http_request, measure, median, skip

ROUTERS = ("vllm-router", "sglang-router")
REMOTE = "gateway, remote"


def servers(stand: Stand, redis: bool, cached: bool, before: Path | None) -> list[Server]:
    """The bare application, the gateway, and the gateway where its answers come from the cache; both once more of `before`."""
    if redis or cached:
        stand.start_redis()
    stand.start_writer()
    stand.start_engine()
    path = stand.folder / "bare.sock"
    options = [
        "--uds",
        str(path),
        "--app-dir",
        str(ROOT / "bench"),
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    process = stand.start("bare ASGI", [PYTHON, "-m", "uvicorn", "bare_asgi:app", *options])
    stand.until("it listens", "bare ASGI", path.exists)
    bare = Server("bare ASGI", path, http_request(stand.key), {"itself": process})
    program = [PYTHON, "-m", "llmserve"]
    gateways = [stand.gateway("gateway", program)]
    if before:
        environment = {"PYTHONPATH": f"{before.resolve()}:{before.resolve()}/payload"}
        gateways.append(stand.gateway("gateway before", program, environment=environment))
    hit = http_request(stand.key, temperature=0)
    hits = [replace(each, name=f"{each.name}, cache hit", request=hit) for each in gateways if cached]
    return [bare, *gateways, *hits]


def remotes(stand: Stand, before: Path | None) -> list[Server]:
    """The gateway and the routers that are installed, in front of the same server; each again for streams."""
    port = free_port()
    stand.start("API", [PYTHON, str(ROOT / "bench/scripted_api.py"), "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    engines = {"echo": {"remote": {"url": url, "revision": "1", "slots": 1000}}}
    program = [PYTHON, "-m", "llmserve"]
    whole = [stand.gateway(REMOTE, program, engines=engines)]
    if before:
        environment = {"PYTHONPATH": f"{before.resolve()}:{before.resolve()}/payload"}
        whole.append(stand.gateway(f"{REMOTE}, before", program, environment=environment, engines=engines))
    whole += [router(stand, name, url) for name in ROUTERS if installed(name)]
    request = http_request(stand.key, stream=True)
    return whole + [
        replace(each, name=f"{each.name}, an event", request=request, events=EVENTS) for each in whole
    ]


def installed(router: str) -> bool:
    """Whether the peer is installed; prints a note if it is not."""
    if (ROOT / f"bench/.venv-routers/bin/{router}").exists():
        return True
    skip(f"{router} is not installed: make peers PEER=routers")
    return False


def router(stand: Stand, name: str, url: str) -> Server:
    """A router of one server, once it answers."""
    port = free_port()
    command = [
        str(ROOT / f"bench/.venv-routers/bin/{name}"),
        *(["launch"] if name == "sglang-router" else []),
    ]
    options = ["--worker-urls", url, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--prometheus-port", str(free_port()), "--log-level", "error"]
    process = stand.start(name, [*command, *options])
    server = Server(name, ("127.0.0.1", port), http_request(stand.key), {"itself": process})
    stand.until_answered(server)
    return server


def ratios(by_server: dict[str, Round], path: str) -> list[tuple[str, Round, Round]]:
    """The comparisons on a path (`path`: the suffix of its names)."""
    ours = by_server[REMOTE + path]
    names = [name + path for name in (f"{REMOTE}, before", *ROUTERS)]
    return [(f"{REMOTE}{path} / {name}", ours, by_server[name]) for name in names if name in by_server]


def table(results: dict[str, dict[str, Round]]) -> str:
    """The results in Markdown."""
    beside = [name for name in next(iter(results.values()))["gateway"].cpu_us if name != "itself"]
    heads = [
        "connections",
        "server",
        "requests/s",
        "CPU µs a request or event",
        *(f"{name}'s" for name in beside),
    ]
    heads += ["p50 ms", "p99 ms"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for connections, by_server in results.items():
        for name, value in by_server.items():
            cells = [connections, name, f"{value.rate:.0f}", f"{value.cpu_us['itself']:.0f}"]
            cells += [f"{value.cpu_us[each]:.0f}" if each in value.cpu_us else "" for each in beside]
            lines.append(f"| {' | '.join([*cells, f'{value.p50_ms:.2f}', f'{value.p99_ms:.2f}'])} |")
        pairs = [("gateway / bare", by_server["gateway"], by_server["bare ASGI"])]
        if REMOTE in by_server:
            pairs += ratios(by_server, "") + ratios(by_server, ", an event")
        for name, one, other in pairs:
            cells = [connections, name, f"{one.rate / other.rate:.2f}"]
            cells += [f"{one.cpu_us['itself'] / other.cpu_us['itself']:.2f}", *[""] * len(beside)]
            cells += [f"{one.p50_ms / other.p50_ms:.1f}", f"{one.p99_ms / other.p99_ms:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server, in turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--redis", action="store_true", help="quotas are counted in a Redis")
    parser.add_argument("--cached", action="store_true", help="answers from the cache beside the others")
    parser.add_argument("--remote", action="store_true", help="remote engines and routers beside the others")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="its gateway too, in the same turns")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    results: dict[str, dict[str, Round]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as name, Stand(Path(name)) as stand:
        asked = servers(stand, options.redis, options.cached, options.before)
        if options.remote:
            asked += remotes(stand, options.before)
        for connections in options.connections:
            rounds: dict[str, list[Round]] = {server.name: [] for server in asked}
            for number in range(options.rounds):
                for server in asked:
                    print(f"{connections} connections, round {number + 1}: {server.name}", file=sys.stderr)
                    rounds[server.name].append(measure(server, connections, options.seconds))
            results[str(connections)] = {name: median(each) for name, each in rounds.items()}
    if options.json:
        print(
            json.dumps(
                {count: {name: asdict(each) for name, each in by.items()} for count, by in results.items()}
            )
        )
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
