#!/usr/bin/python3.13
"""Time to first token of a conversation's second turn with vLLM's prefix cache, and whether another tenant could detect it.

Each round uses a new conversation of about `--tokens` tokens. Its tenant sends the first and the second turn; another tenant
sends the same second turn, and then a new one. The latter two differ only in what the first tenant left in the cache: their ratio
is 1 if the gateway's `cache_salt` separates tenants. Their order alternates by round.

Needs `make env` and `make peers PEER=vllm`. Exit code 0, or 1 where vLLM is not there.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine_peers
from engine_peers import Target, ask_one
from stand import PYTHON, Stand, skip

CONTEXT = 8192
WORDS = ["river", "stone", "window", "garden", "letter", "music", "winter", "market"]
KNOWN, UNKNOWN = "another tenant, known", "another tenant, unknown"
CASES = {
    "first turn": "the tenant's first turn",
    "second turn": "its second turn",
    KNOWN: "the same second turn of another tenant",
    UNKNOWN: "a new second turn of the other tenant",
}


def key_of(stand: Stand, tenant: str) -> str:
    """A new API key."""
    who = ["--subject", tenant, "--tenant", tenant, "--role", "developer", "--json"]
    files = ["--keys-file", str(stand.folder / "keys.json"), "--pepper-file", str(stand.folder / "pepper")]
    added = subprocess.run(
        [PYTHON, "-m", "llmserve", "keys", "add", *who, *files], check=True, capture_output=True
    )
    return str(json.loads(added.stdout)["key"])


def conversation(tokens: int, number: int) -> list[dict[str, str]]:
    """A first turn; each word is a token, and none of them begins as another conversation's."""
    words = random.Random(number).choices(WORDS, k=tokens)  # noqa: S311 (no secret)
    return [{"role": "user", "content": f"{number} {' '.join(words)}. Tell me a story about a river."}]


def second(first: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation's second turn."""
    return [
        *first,
        {"role": "assistant", "content": "Once upon a time there was a river."},
        {"role": "user", "content": "Tell me a story."},
    ]


def measure(options: argparse.Namespace, stand: Stand) -> dict[str, list[float]]:
    """Seconds until the first token, by case."""
    stand.start_writer()
    name = options.model.name
    more = ["--max-model-len", str(CONTEXT), "--max-num-batched-tokens", "2048"]
    vllm = engine_peers.start_vllm(stand, str(options.model.resolve()), "float32", name, *more)
    remote = {"url": f"http://127.0.0.1:{vllm.port}", "revision": "bench", "context": CONTEXT}
    owner = engine_peers.start_gateway(stand, "gateway", name, {"remote": remote}, vllm.processes["engine"])
    other = Target(owner.name, owner.port, key_of(stand, "other"), name, {})
    seconds: dict[str, list[float]] = {case: [] for case in CASES}

    def first_token(case: str, target: Target, messages: list[dict[str, str]]) -> None:
        begun = time.monotonic()
        ask_one(target, 1, messages)  # whose end is its first token
        seconds[case].append(time.monotonic() - begun)

    for number in range(options.rounds):
        first = conversation(options.tokens, 2 * number)
        first_token("first turn", owner, first)
        first_token("second turn", owner, second(first))
        both = [(KNOWN, second(first)), (UNKNOWN, second(conversation(options.tokens, 2 * number + 1)))]
        for case, messages in both[:: 1 if number % 2 else -1]:
            first_token(case, other, messages)
        print(
            f"round {number + 1}: {[f'{each[-1]:.2f} s' for each in seconds.values()]}",
            file=sys.stderr,
            flush=True,
        )
    return seconds


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".lab/bundle/models/smollm2-135m-instruct"))
    parser.add_argument("--tokens", type=int, default=7500, help="of the first turn, at most 8000")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    if not engine_peers.installed("vllm").exists():
        skip("vLLM is not there: `make peers PEER=vllm` installs it")
        return 1
    with (
        tempfile.TemporaryDirectory(prefix="bench-prefix-") as folder,
        Stand(Path(folder), pinned=False) as stand,
    ):
        seconds = measure(options, stand)
    print("| request | median s | of the first turn |\n|---|---|---|")
    medians: dict[str, Any] = {case: statistics.median(each) for case, each in seconds.items()}
    for case, label in CASES.items():
        print(f"| {label} | {medians[case]:.2f} | {medians[case] / medians['first turn']:.2f} |")
    ratios = [known / unknown for known, unknown in zip(seconds[KNOWN], seconds[UNKNOWN], strict=True)]
    print(f"\nknown to unknown, by round: {', '.join(f'{each:.2f}' for each in sorted(ratios))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
