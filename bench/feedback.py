#!/usr/bin/python3.13
"""Measures the cost of a rating: a gateway's CPU time for a `POST /v1/feedback`, compared with an answer; of the id of an answer,
and of its assignment to an arm of an experiment.

One gateway, as in bench/gateway.py, with a journal; answers and ratings are measured in turns. Each rating is on disk when it
is acknowledged, so its latency is that of the disk.

Needs nothing but `make env`. Exit code 0, or 1 if a request failed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from stand import PYTHON, ROOT, Round, Server, Stand, first_bytes, http_request, in_turns, median

BUDGET_RATING_US, BUDGET_ID_US = 2000, 10
SETUP = """
from llmserve.access.experiments import Experiment
from llmserve.access.identity import Identity
from llmserve.feedback.response_ids import ResponseIds
ids, who = ResponseIds((bytes(32),)), Identity("api_key", "1", "ada", "research", ())
experiment = Experiment("support-12", "support", "support-7", "support-8", "subject", 50, "0123456789abcdef" * 2)
"""
# One answer is rated without end, which a gateway refuses; the lookup of how often it was is left out.
UNBOUND = """
import sys
from llmserve.feedback import index, journal
journal.RATINGS_OF_ONE = journal.RATING_BYTES = 1 << 40
index.rated = lambda *_: 0
from llmserve.cli import main
sys.exit(main())
"""
ISSUE, ASSIGN, TIMES = (
    "ids.issue('0123456789abcdef', who)",
    "experiment.assign(who, '0123456789abcdef')",
    20_000,
)


def servers(stand: Stand) -> list[Server]:
    """A gateway that answers questions, and the same one that gets ratings of its first answer."""
    stand.start_writer()
    stand.start_engine()
    (stand.folder / "journal").mkdir()
    answers = stand.gateway(
        "answers", [PYTHON, "-c", UNBOUND], feedback={"folder": str(stand.folder / "journal")}
    )
    found = re.search(rb"x-llm-response-id: (\S+)", first_bytes(answers))
    if found is None:
        raise RuntimeError("the answer has no header x-llm-response-id")
    body = json.dumps({"id": found[1].decode(), "thumb": "down", "reason": "wrong"})
    head, _, _ = http_request(stand.key).partition(b"\r\n\r\n")
    head = head.replace(b"/v1/chat/completions", b"/v1/feedback")
    head = re.sub(rb"content-length: \d+", b"content-length: %d" % len(body), head)
    return [answers, replace(answers, name="ratings", request=head + b"\r\n\r\n" + body.encode())]


def cpu_us(statement: str) -> float:
    """CPU time of a statement, in microseconds: the best of five rounds."""
    code = f"import time, timeit; print(min(timeit.repeat({statement!r}, {SETUP!r}, time.process_time, 5, {TIMES})))"
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT / "payload", check=True, capture_output=True)
    return float(done.stdout) / TIMES * 1e6


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, in turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    results: dict[int, dict[str, Round]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-feedback-", dir="/var/tmp") as name,
        Stand(Path(name)) as stand,
    ):
        both = servers(stand)
        for connections in options.connections:
            rounds = in_turns(both, connections, options.rounds, options.seconds)
            results[connections] = {name: median(each) for name, each in rounds.items()}
    issued, assigned = cpu_us(ISSUE), cpu_us(ASSIGN)
    if options.json:
        told = {count: {name: asdict(each) for name, each in by.items()} for count, by in results.items()}
        print(json.dumps({"rounds": told, "id_us": issued, "assignment_us": assigned}))
        return 0
    print("| connections | | a second | gateway's CPU µs each | p50 ms | p99 ms |\n|---|---|---|---|---|---|")
    for count, by in results.items():
        for name, each in by.items():
            cells = [str(count), name, f"{each.rate:.0f}", f"{each.cpu_us['itself']:.0f}"]
            print("|", " | ".join([*cells, f"{each.p50_ms:.2f}", f"{each.p99_ms:.2f}"]), "|")
    cost = f"An id: {issued:.1f} µs, an assignment: {assigned:.1f} µs (budget of both {BUDGET_ID_US})"
    print(f"\n{cost}; a rating's budget is {BUDGET_RATING_US} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
