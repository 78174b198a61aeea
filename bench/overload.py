#!/usr/bin/python3.13
"""Measures the effect of overload on accepted requests, and how soon others are refused, at several times the engine's capacity.

Requests arrive at a fixed rate, regardless of earlier answers: at half of the engine's capacity for a third of the time, at
--factor times its capacity, and at half again. The budget: the 99th percentile of accepted requests is at most 1.5 times that of
the unloaded gateway plus the queue's longest wait, and every other request gets 429 or 503 in 20 ms. The gateway does everything
that it does in production; the `echo` engine takes 50 ms per token and has eight slots. The time of a refusal is reported twice:
as seen by the client, which shares the machine with all other work, and as reported by the gateway in `x-llm-overhead-us`. Both
grow while other work has the cores, so the gateway's waiting time for a core is reported as well.

Needs `make env` and redis-server. Exit code 0, or 1 if an answer was neither 200 nor 429 nor 503.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import plot
from stand import PYTHON, Connection, Server, Stand, connect, core_wait_seconds, cpu_seconds, measure

ENGINE: dict[str, Any] = {"slots": 8, "token_seconds": 0.05}
LIMITS = {"waiting": 8, "queue_seconds": 0.5}
ACCEPTED_FACTOR = 1.5
REFUSAL_MS = 20
REFUSED = (429, 503)


@dataclass
class Visit:
    """One request: its status, the client's milliseconds, and the gateway's own."""

    status: int
    ms: float
    own_ms: float


@dataclass
class Phase:
    """One load. Times are pairs, median and 99th percentile, in milliseconds; `late` is the client's own lateness.

    Of the gateway's process: CPU µs a request, and of each second the part in which it waited for a core that other
    work had.
    """

    asked_rate: float
    statuses: dict[int, int]
    accepted_ms: tuple[float, float]
    refused_ms: tuple[float, float]
    refused_own_ms: tuple[float, float]
    refused_in_time: float
    refused_own_in_time: float
    late_ms: tuple[float, float]
    cpu_us: float
    waited_for_core: float


class Visitor(Connection):
    """Sends a request on command, and is idle afterwards."""

    def __init__(self, server: Server, visits: list[Visit], idle: deque["Visitor"]) -> None:
        """`visits` and `idle` are shared by all."""
        super().__init__(server, [], asyncio.get_running_loop().create_future())
        self.visits = visits
        self.idle = idle

    def next(self) -> None:
        """Nothing of its own accord."""

    def answered(self, head: bytes) -> None:
        """Whatever it is."""
        ms = (time.perf_counter() - self.asked) * 1e3
        own = head.lower().partition(b"x-llm-overhead-us:")[2].split(b"\r\n", 1)[0]
        self.visits.append(Visit(int(head[9:12]), ms, int(own) / 1e3))
        self.idle.append(self)


async def arrivals(server: Server, rate: float, seconds: float) -> tuple[list[Visit], list[float]]:
    """All visits of `seconds` with `rate` a second, and by how many milliseconds each was late."""
    visits: list[Visit] = []
    idle: deque[Visitor] = deque()
    everyone: list[Visitor] = []
    late = []
    begun = time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        late.append((time.perf_counter() - begun - number / rate) * 1e3)
        if idle:
            visitor = idle.popleft()
        else:
            visitor = Visitor(server, visits, idle)
            await connect(visitor, server.address)
            everyone.append(visitor)
        visitor.ask()
    async with asyncio.timeout(30):
        while len(visits) < len(late):
            await asyncio.sleep(0.05)
            if broken := next((each.done for each in everyone if each.done.done()), None):
                broken.result()  # raises what ended the connection
    for visitor in everyone:
        visitor.done.cancel()
        visitor.transport.close()
    return visits, late


def median_and_p99(numbers: list[float]) -> tuple[float, float]:
    """Of none: zeros."""
    if len(numbers) < 2:
        return (numbers * 2 or [0.0, 0.0])[0], (numbers * 2 or [0.0, 0.0])[1]
    cuts = quantiles(numbers, n=100, method="inclusive")
    return cuts[49], cuts[98]


def phase(server: Server, rate: float, seconds: float) -> Phase:
    """Measure one load."""
    print(f"{rate:.0f} requests a second for {seconds:.0f} s", file=sys.stderr)
    process = server.processes["itself"]
    used, waited, begun = cpu_seconds(process), core_wait_seconds(process), time.monotonic()
    visits, late = asyncio.run(arrivals(server, rate, seconds))
    used, waited = cpu_seconds(process) - used, core_wait_seconds(process) - waited
    refused = [each for each in visits if each.status in REFUSED]
    count = len(refused) or 1
    return Phase(
        rate,
        dict(Counter(each.status for each in visits)),
        median_and_p99([each.ms for each in visits if each.status == 200]),
        median_and_p99([each.ms for each in refused]),
        median_and_p99([each.own_ms for each in refused]),
        sum(each.ms < REFUSAL_MS for each in refused) / count,
        sum(each.own_ms < REFUSAL_MS for each in refused) / count,
        median_and_p99(late),
        used / len(visits) * 1e6,
        waited / (time.monotonic() - begun),
    )


def table(phases: dict[str, Phase], budget: float) -> str:
    """The results in Markdown."""
    heads = ["load", "requests/s", "200", "429, 503", "other", "accepted p50, p99 ms", "refused p50, p99 ms"]
    heads += ["in 20 ms", "refused, own p50, p99 ms", "in 20 ms", "client late p99 ms"]
    heads += ["gateway's CPU µs a request", "it waited for a core"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, each in phases.items():
        refused = sum(each.statuses.get(status, 0) for status in REFUSED)
        accepted = each.statuses.get(200, 0)
        cells = [name, f"{each.asked_rate:.0f}", str(accepted), str(refused)]
        cells += [str(sum(each.statuses.values()) - accepted - refused)]
        pairs = [f"{half:.0f}, {most:.0f}" for half, most in (each.accepted_ms, each.refused_ms)]
        own = f"{each.refused_own_ms[0]:.2f}, {each.refused_own_ms[1]:.2f}"
        cells += [*pairs, f"{each.refused_in_time:.1%}" if refused else "", own]
        cells += [f"{each.refused_own_in_time:.1%}" if refused else "", f"{each.late_ms[1]:.0f}"]
        cells += [f"{each.cpu_us:.0f}", f"{each.waited_for_core:.0%} of the time"]
        lines.append(f"| {' | '.join(cells)} |")
    p99 = phases["overload"].accepted_ms[1]
    said = "kept" if p99 <= budget else "MISSED"
    lines.append(f"\nAccepted p99 {p99:.0f} ms; budget 1.5 x (unloaded + queue) = {budget:.0f} ms: {said}")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    parser.add_argument("--factor", type=float, default=5.0, help="times what the engine can do")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--plot", type=Path, help="an SVG of the 99th percentiles")
    options = parser.parse_args()
    load = f"{os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory(prefix="bench-overload-") as folder, Stand(Path(folder)) as stand:
        stand.start_redis()
        stand.start_writer()
        stand.start_engine(**ENGINE)
        server = stand.gateway("gateway", [PYTHON, "-m", "llmserve"], limits=LIMITS)
        capacity = measure(server, ENGINE["slots"], 5).rate
        rates = {"unloaded": 0.5, "overload": options.factor, "unloaded again": 0.5}
        phases = {
            name: phase(server, capacity * share, options.seconds if share > 1 else options.seconds / 3)
            for name, share in rates.items()
        }
    unloaded = min(phases["unloaded"].accepted_ms[1], phases["unloaded again"].accepted_ms[1])
    budget = ACCEPTED_FACTOR * (unloaded + LIMITS["queue_seconds"] * 1e3)
    print(f"load average: {load} at the beginning, {os.getloadavg()[0]:.1f} at the end", file=sys.stderr)
    if options.json:
        described = {name: asdict(each) for name, each in phases.items()}
        print(json.dumps({"phases": described, "accepted_p99_budget_ms": budget}))
    else:
        print(table(phases, budget))
    if options.plot:
        bars = {
            name: {
                "accepted": each.accepted_ms[1],
                "refused, as the client sees it": each.refused_ms[1],
                "refused, the gateway's own time": each.refused_own_ms[1],
            }
            for name, each in phases.items()
        }
        plot.draw(options.plot, "99th percentile", "ms", bars, budget)
    return 0 if all(set(each.statuses) <= {200, *REFUSED} for each in phases.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
