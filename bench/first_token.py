#!/usr/bin/python3.13
"""Time to first token of the gateway in front of an engine: P50 and P99 of 1, 16 and 64 concurrent streams.

Each client requests one greedy stream after the other, by HTTP on loopback, and notes when the first text arrives: this includes
the connection, the gateway with everything enabled, its queue, and the prompt. The engine is `naive` on a GPU (--device cuda),
which answers one at a time, so that most of a 64th client's time is its place in the queue; or `continuous` on the CPU.

Needs `make env`. Without redis-server on this machine the gateway counts quotas by itself, and the output says so.
Exit code 0, or 1 if an answer had no text.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from typing import Any

from engine_peers import Target, ask_one, prompts, start_gateway
from engines import Mode, described
from stand import Stand, skip


def first_tokens(
    target: Target, streams: int, requests: int, tokens: int, turns: Any
) -> tuple[list[float], int]:
    """Seconds until the first text of each answer, `requests` of each of `streams` clients; and the tokens of all."""
    questions = [prompts(streams, next(turns)) for _ in range(requests)]

    def client(number: int) -> list[tuple[int, float]]:
        return [ask_one(target, tokens, each[number]) for each in questions]

    with ThreadPoolExecutor(streams) as pool:
        answers = list(itertools.chain.from_iterable(pool.map(client, range(streams))))
    return [first for _, first in answers], sum(made for made, _ in answers)


def measure(stand: Stand, options: argparse.Namespace) -> dict[str, Any]:
    """By number of streams: milliseconds, and how many answers they are of."""
    if shutil.which("redis-server"):
        stand.start_redis()
    else:
        skip("Redis: no redis-server here, so the gateway counts quotas by itself")
    stand.start_writer()
    mode = Mode("model", "naive" if options.device == "cuda" else "continuous", options.dtype)
    stand.start_engine("model", **described(stand.folder, mode, options.model.resolve(), options))
    engine = {"socket": str(stand.folder / "engine.sock")}
    target = start_gateway(stand, "gateway", "model", engine, stand.started["engine"].pid)
    turns = itertools.count()
    first_tokens(target, 1, 2, 4, turns)  # whatever is made at first use
    results: dict[str, Any] = {}
    for streams in options.streams:
        requests = max(1, options.requests // streams)
        seconds, tokens = first_tokens(target, streams, requests, options.tokens, turns)
        if not all(seconds):
            raise SystemExit(f"{sum(not each for each in seconds)} of {len(seconds)} answers had no text")
        cuts = quantiles(seconds, n=100, method="inclusive")
        results[str(streams)] = {
            "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "answers": len(seconds), "tokens": tokens,
        }  # fmt: skip
        print(f"{streams} streams: {results[str(streams)]}", file=sys.stderr, flush=True)
    return {"driver": mode.driver, "redis": stand.redis is not None, "streams": results}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a directory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=64, help="in all, at each number of streams")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    options.quantization = "none"
    with (
        tempfile.TemporaryDirectory(prefix="bench-first-token-") as name,
        Stand(Path(name), pinned=options.device == "cpu") as stand,
    ):
        found = measure(stand, options)
    if options.json:
        print(json.dumps(found))
    else:
        print("| streams | answers | P50 ms | P99 ms |\n|---|---|---|---|")
        for streams, each in found["streams"].items():
            print(f"| {streams} | {each['answers']} | {each['p50_ms']:.0f} | {each['p99_ms']:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
