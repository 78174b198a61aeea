#!/usr/bin/env -S payload/.venv/bin/python
"""The slowest body: how long validation holds a gateway's event loop, for bodies of the largest size that is allowed.

Every list of the API filled with every kind of item, then random mixtures: bench/serving/slow_body.py [--number 500] [--seed 5]
CPU milliseconds of this thread; needs nothing but `make env`.
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "payload/tests/helpers"))

from large_bodies import large_bodies, random_bodies
from llmserve.api.errors import ApiError
from llmserve.gateway.parsed_requests import chat, embedding
from llmserve.settings import Limits


def milliseconds(name: str, body: bytes) -> float:
    """The least of three runs."""
    taken = []
    for _ in range(3):
        before = time.thread_time()
        with suppress(ApiError):
            (embedding if name.startswith("input") else chat)(body, Limits())
        taken.append((time.thread_time() - before) * 1000)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=500, help="random mixtures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    size = Limits().body_bytes
    bodies = [*large_bodies(size), *random_bodies(size, options.number, options.seed)]
    found = sorted(((milliseconds(*each), each[0]) for each in bodies), reverse=True)
    print(f"{len(found)} bodies of {size} bytes; the slowest:")
    for taken, name in found[:8]:
        print(f"{taken:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
