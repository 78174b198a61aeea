#!/usr/bin/python3.13
"""What the gateway costs: requests a second, CPU a request, p50 and p99, beside a bare ASGI application.

Both are served by uvicorn (uvloop, httptools, one worker) on a UNIX socket, and measured in turns in the same
run, since on a machine that does other work too only ratios are comparable. The gateway does all it does in
production: request id, body limit, key, policy (embedded, on a signed bundle), quotas, admission, metrics, access
log, and an intent on disk before each answer. The `echo` engine, the audit writer and Redis are processes of their own.

Needs nothing but `make env`. Exit code 0, or 1 if a request failed.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from stand import PYTHON, ROOT, Round, Server, Stand, http_request, measure, median


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


def table(results: dict[str, dict[str, Round]]) -> str:
    """For people, in Markdown."""
    beside = [name for name in next(iter(results.values()))["gateway"].cpu_us if name != "itself"]
    heads = ["connections", "server", "requests/s", "CPU µs a request", *(f"{name}'s" for name in beside)]
    heads += ["p50 ms", "p99 ms"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for connections, by_server in results.items():
        for name, value in by_server.items():
            cells = [connections, name, f"{value.rate:.0f}", f"{value.cpu_us['itself']:.0f}"]
            cells += [f"{value.cpu_us[each]:.0f}" if each in value.cpu_us else "" for each in beside]
            lines.append(f"| {' | '.join([*cells, f'{value.p50_ms:.2f}', f'{value.p99_ms:.2f}'])} |")
        bare, gateway = by_server["bare ASGI"], by_server["gateway"]
        cells = [connections, "gateway / bare", f"{gateway.rate / bare.rate:.2f}"]
        cells += [f"{gateway.cpu_us['itself'] / bare.cpu_us['itself']:.1f}", *[""] * len(beside)]
        cells += [f"{gateway.p50_ms / bare.p50_ms:.1f}", f"{gateway.p99_ms / bare.p99_ms:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server, in turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--redis", action="store_true", help="quotas are counted in a Redis")
    parser.add_argument("--cached", action="store_true", help="answers from the cache beside the others")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="its gateway too, in the same turns")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    results: dict[str, dict[str, Round]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as name, Stand(Path(name)) as stand:
        both = servers(stand, options.redis, options.cached, options.before)
        for connections in options.connections:
            rounds: dict[str, list[Round]] = {server.name: [] for server in both}
            for number in range(options.rounds):
                for server in both:
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
