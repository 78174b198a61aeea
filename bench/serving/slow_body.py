#!/usr/bin/env -S payload/.venv/bin/python
"""Finds the slowest body: how long it blocks a gateway's event loop, for bodies of the maximum size.

Every list of the API filled with every kind of item, texts that are slow to redact, then random mixtures:
bench/serving/slow_body.py [--number 500] [--seed 5]
CPU milliseconds of this thread for what depends on the body's size, up to the next point where answers of others come between:
validation and routing; redaction; the key of the cache, and what is sent to the engine. The longest of the three. Exit code 1
above --budget. Needs nothing but `make env`.
"""

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "payload/tests/helpers"))

from large_bodies import large_bodies, random_bodies, reader
from llmserve.api.errors import ApiError
from llmserve.api.requests import refuse_undeclared
from llmserve.audit.recorder import Recorder
from llmserve.audit.redact import redact
from llmserve.audit.writer_client import AuditClient
from llmserve.fields import PASSED
from llmserve.gateway.parsed_requests import ParsedRequests
from llmserve.metrics import Metrics
from llmserve.protocol import Hello, encode
from llmserve.settings import MOST_BODY_BYTES
from llmserve.upstream.instances import Prefix

HELLO = Hello("m", "r", "echo", 4096, 8, [*PASSED])
GRANTED = 2048  # tokens of an answer
PARSED = ParsedRequests(Recorder(AuditClient(Path("none"), Metrics()), b"pepper").proof, b"secret")


def milliseconds(name: str, body: bytes) -> float:
    """The least of three runs."""
    taken = []
    for _ in range(3):
        before = time.thread_time()
        with suppress(ApiError):
            parsed = PARSED.read("t", reader(name), GRANTED, body)
            Prefix.of_request("t", parsed.call.generate)
            refuse_undeclared(parsed.call.generate, "m", HELLO, dict)
            routed = time.thread_time()
            redact(parsed.content)
            recorded = time.thread_time()
            parsed.key("t", 1, HELLO)
            encode(parsed.call.generate)
            taken.append(1000 * max(routed - before, recorded - routed, time.thread_time() - recorded))
            continue
        taken.append(1000 * (time.thread_time() - before))
    return min(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=500, help="random mixtures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--budget", type=float, default=50.0, help="milliseconds (default: %(default)s)")
    options = parser.parse_args()
    bodies = [*large_bodies(MOST_BODY_BYTES), *random_bodies(MOST_BODY_BYTES, options.number, options.seed)]
    found = sorted(((milliseconds(*each), each[0]) for each in bodies), reverse=True)
    print(f"{len(found)} bodies of {MOST_BODY_BYTES} bytes; the slowest:")
    for taken, name in found[:8]:
        print(f"{taken:8.1f} ms  {name[:100]}")
    return 0 if found[0][0] <= options.budget else 1


if __name__ == "__main__":
    sys.exit(main())
