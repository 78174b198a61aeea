#!/usr/bin/env -S payload/.venv/bin/python
"""Measures the cost of admission: CPU µs of one enter() and leave(), with free slots and with queues of several lengths.

bench/serving/admission.py [--before CHECKOUT] [--rounds 5]: with --before, the other checkout's admission in turns
with this one's, each in a process of its own. Medians. Needs nothing but `make env`.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
REQUESTS = 5000
CASES = {
    "free slots": (1, 0),
    "64 wait, 1 tenant": (1, 64),
    "64 wait, 32 tenants": (32, 64),
    "1024 wait, 32 tenants": (32, 1024),
}


async def microseconds(tenants: int, waiting: int) -> float:
    """CPU of a request, while so many of as many tenants wait; the queue is refilled at each end."""
    from llmserve.upstream.admission import Admission, Place, Queue

    def place(number: int) -> Place:
        named: dict[str, Any] = (
            {"tenant": f"tenant {number % tenants}"} if "tenant" in Place.__dataclass_fields__ else {}
        )
        return Place(600, 256, **named)

    admission = Admission(Queue(10**6, 10**9))
    admission.slots = 1
    ran: asyncio.Queue[Place] = asyncio.Queue()

    async def visit(mine: Place) -> None:
        await admission.enter(mine)
        ran.put_nowait(mine)

    tasks = [asyncio.create_task(visit(place(number))) for number in range(waiting + 1)]
    before = time.process_time()
    for number in range(REQUESTS):
        done = await ran.get()
        admission.leave(done)
        tasks.append(asyncio.create_task(visit(place(number))))
    used = time.process_time() - before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return used / REQUESTS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="its admission too, in turns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--one", action="store_true", help="one round of the admission on PYTHONPATH, as JSON"
    )
    options = parser.parse_args()
    if options.one:
        print(json.dumps({name: asyncio.run(microseconds(*case)) for name, case in CASES.items()}))
        return
    trees = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(options.rounds):
        for name, tree in trees.items():
            environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree}/payload"}
            command = [sys.executable, __file__, "--one"]
            found[name].append(json.loads(subprocess.check_output(command, env=environment)))
    print(f"CPU µs of a request, load average {os.getloadavg()[0]:.1f}")
    for case in CASES:
        cells = [f"{name} {median(each[case] for each in rounds):.1f}" for name, rounds in found.items()]
        print(f"{case:24} {', '.join(cells)}")


if __name__ == "__main__":
    main()
