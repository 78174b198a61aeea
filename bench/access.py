#!/usr/bin/python3.13
"""Measures the cost of access control: each layer by itself, and all of them together as the gateway's CPU time per request.

The total compares the unchanged gateway with the same gateway in which single layers, or all of them, are bypassed (done in
bench/serving; the product has no such switch), queried in turns in one run. The difference of two neighbouring rounds is the cost
of a layer; the table shows the median of the differences. A process that waits for the disk also pays for falling asleep and
waking up with cold caches, so the table also shows the cost of 1 ms of rest before each request for the gateway without all four
layers.

Needs nothing but `make env`; OPA is measured where `llmkeep program opa` has it.
Exit code 0, or 1 if a request failed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from stand import PYTHON, ROOT, Round, Server, Stand, in_turns, median, skip

LAYERS = ["authentication", "policy", "quotas", "audit"]
BUDGET_CPU_US = 100
RESTED = "a rest of 1 ms, without all four"
BUDGETS_US = {"decision, kept": 10, "decision, OPA by its UNIX socket": 1000}


def start_opa(stand: Stand) -> None:
    """Run OPA as in the role opa, on the signed bundle as a file, if the program is available."""
    asked = subprocess.run(
        [ROOT / ".venv/bin/llmkeep", "program", "opa"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if asked.returncode:
        skip("OPA by its UNIX socket: `llmkeep program opa` has none")
        return
    key = (stand.folder / "policy.pem").read_text()
    bundle = {  # looked at once: what a poll costs is not what a decision costs
        "resource": f"file://{stand.folder}/bundle.tar.gz",
        "polling": {"min_delay_seconds": 3600, "max_delay_seconds": 7200},
        "signing": {"keyid": "policy"},
    }
    config = {"bundles": {"llm": bundle}, "keys": {"policy": {"algorithm": "ES256", "key": key}}}
    (stand.folder / "opa.json").write_text(json.dumps(config))
    path = stand.folder / "opa.sock"
    options = ["--addr", f"unix://{path}", "--log-level", "error", "--skip-version-check"]
    options += ["--config-file", str(stand.folder / "opa.json")]
    guard = ROOT / "roles/opa/files/authz.rego"
    if guard.exists():
        options += ["--authorization=basic", str(guard)]
    stand.start("OPA", [asked.stdout.strip(), "run", "--server", *options], {"GOMAXPROCS": "4"})
    stand.until("OPA listens", "OPA", path.exists)


def layers(stand: Stand) -> list[dict[str, float | str]]:
    """Measure each layer by itself."""
    start_opa(stand)
    print("each layer by itself", file=sys.stderr)
    measured = subprocess.run(
        [PYTHON, ROOT / "bench/serving/layers.py", stand.folder],
        input=stand.key + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[dict[str, float | str]] = json.loads(measured.stdout)
    return rows


def gateways(stand: Stand) -> list[Server]:
    """The unchanged gateway, one without each of the layers, and one without all of them."""
    servers = [stand.gateway("as it is", [PYTHON, "-m", "llmserve"])]
    launcher = str(ROOT / "bench/serving/gateway_without.py")
    for name, without in [
        *((f"without {each}", each) for each in LAYERS),
        ("without all four", ",".join(LAYERS)),
    ]:
        servers.append(stand.gateway(name, [PYTHON, launcher, without]))
    return [*servers, replace(servers[-1], name=RESTED, pause=0.001)]


def costs(by_server: dict[str, list[Round]]) -> dict[str, dict[str, float]]:
    """CPU µs a request that each layer adds, and the rest: median, and the lowest and highest of the rounds."""

    def cpu(name: str) -> list[float]:
        return [each.cpu_us["itself"] for each in by_server[name]]

    found = {}
    for name in [*LAYERS, "all four"]:
        added = [most - less for most, less in zip(cpu("as it is"), cpu(f"without {name}"), strict=True)]
        found[name] = {"median": statistics.median(added), "low": min(added), "high": max(added)}
    rest = [most - less for most, less in zip(cpu(RESTED), cpu("without all four"), strict=True)]
    found["rest"] = {"median": statistics.median(rest), "low": min(rest), "high": max(rest)}
    return found


def layers_table(rows: list[dict[str, float | str]]) -> str:
    """The results in Markdown."""
    lines = ["| what | p50 µs | p99 µs | CPU µs | budget, p50 |", "|---|---|---|---|---|"]
    for each in rows:
        budget = BUDGETS_US.get(str(each["name"]), "")
        lines.append(
            f"| {each['name']} | {each['p50_us']:.1f} | {each['p99_us']:.1f} | {each['cpu_us']:.1f} | {budget} |"
        )
    return "\n".join(lines)


def costs_table(results: dict[int, dict[str, list[Round]]]) -> str:
    """The results in Markdown."""
    heads = [
        "connections",
        "as it is",
        *LAYERS,
        f"all four (budget {BUDGET_CPU_US})",
        "its rounds",
        "1 ms of rest",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for connections, by_server in results.items():
        whole = median(by_server["as it is"]).cpu_us["itself"]
        added = costs(by_server)
        every = added["all four"]
        cells = [f"{added[name]['median']:.0f}" for name in [*LAYERS, "all four"]]
        cells += [f"{every['low']:.0f} to {every['high']:.0f}", f"{added['rest']['median']:.0f}"]
        lines.append(f"| {connections} | {whole:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(options: argparse.Namespace, stand: Stand) -> str:
    """Measure, and return the text to print."""
    if shutil.which("redis-server"):
        stand.start_redis()
    else:
        skip("leases from Redis: there is no redis-server")
    stand.start_writer()
    alone = layers(stand)
    stand.start_engine()
    servers = gateways(stand)
    results = {
        connections: in_turns(servers, connections, options.rounds, options.seconds)
        for connections in options.connections
    }
    if options.json:
        document = {
            str(connections): {name: [vars(each) for each in rounds] for name, rounds in by_server.items()}
            for connections, by_server in results.items()
        }
        return json.dumps({"layers": alone, "rounds": document})
    title = "CPU µs a request of the gateway's process, and what of it each layer is:"
    return f"{layers_table(alone)}\n\n{title}\n\n{costs_table(results)}"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each server, in turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the temporary folder's)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the tables")
    options = parser.parse_args()
    print(
        f"load average at the beginning: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr
    )
    with (
        tempfile.TemporaryDirectory(prefix="bench-access-", dir=options.folder) as name,
        Stand(Path(name)) as stand,
    ):
        print(run(options, stand))
    print(f"load average at the end: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
