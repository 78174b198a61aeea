"""`engines.py --peer`: `continuous` behind the gateway with everything on, beside `transformers serve` and vLLM.

All are queried over HTTP on loopback for streams of greedy tokens, with the same concurrent questions, in turns; each has one
thread on one core. vLLM is queried directly and behind one of our gateways (engine `remote`), in the same process, so the CPU of
the gateway, its audit writer and its Redis is our overhead. CPU times include child processes.
"""

import argparse
import http.client
import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stand import PYTHON, ROOT, Server, Stand, cpu_seconds, free_port, http_request, skip

PEERS = ("transformers", "vllm")
GATEWAY = "gateway, continuous"
TRANSFORMERS = "transformers serve"
VLLM, BEHIND = "vLLM", "vLLM behind the gateway"
ENGINE = "engine"
SHARE_OF_TRANSFORMERS = 0.9
ADDED_CPU = 0.03
CONTEXT = 2048
QUIET = {  # and nothing is asked of the internet
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass
class Target:
    """The server and model to query, the processes whose CPU counts, and extra fields of a request."""

    name: str
    port: int
    key: str
    model: str
    processes: dict[str, int]
    more: dict[str, Any] = field(default_factory=lambda: {"stream_options": {"include_usage": True}})


def prompts(count: int, turn: int = 0) -> list[str]:
    """Questions of different lengths that need long answers; different ones in each turn."""
    return [
        f"Story {turn}.{number}: tell me a {'very ' * (number % 8 + 3)}long story." for number in range(count)
    ]


def installed(peer: str) -> Path:
    """Where a peer's programs are. `transformers serve` computes with the torch that ours has, vLLM with its own."""
    return ROOT / f"bench/.venv-{peer}/bin"


def ask_one(target: Target, tokens: int, prompt: str | list[dict[str, str]]) -> tuple[int, float]:
    """Read one stream to its end: how many tokens it had, and seconds until its first text (0: it had none).

    `prompt`: a question, or a conversation's messages.
    Raises RuntimeError if it failed or does not say how many.
    """
    begun = time.monotonic()
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    question = {"model": target.model, "messages": messages, "temperature": 0}
    body = json.dumps({**question, "max_tokens": tokens, "stream": True, **target.more})
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=1800)
    headers = {"content-type": "application/json", "authorization": f"Bearer {target.key}"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{target.name} answers {answer.status}: {answer.read(500)!r}")
    count, first = 0, 0.0
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{target.name} breaks off: {event}")
            if not first and any(each["delta"].get("content") for each in event.get("choices", ())):
                first = time.monotonic() - begun
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    connection.close()
    if not count:
        raise RuntimeError(f"{target.name} does not say how many tokens it made")
    return count, first


def ask(target: Target, count: int, tokens: int, turn: int) -> tuple[float, dict[str, float]]:
    """Send all uncached questions concurrently: tokens per second, and CPU ms per token by process."""
    used = {name: cpu_seconds(process) for name, process in target.processes.items()}
    before = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        total = sum(made for made, _ in pool.map(partial(ask_one, target, tokens), prompts(count, turn)))
    seconds = time.monotonic() - before
    cpu = {name: cpu_seconds(process) - used[name] for name, process in target.processes.items()}
    return total / seconds, {name: each / total * 1000 for name, each in cpu.items()}


def start_peer(stand: Stand, name: str, command: list[str], port: int, model: str) -> Target:
    """A server on a port, as soon as it answers."""
    process = stand.start(name, command, QUIET | {"HOME": str(stand.folder)})
    request = http_request("none", model=model, max_tokens=1)
    stand.until_answered(Server(name, ("127.0.0.1", port), request, {}))
    return Target(name, port, "none", model, {ENGINE: process})


def start_transformers(stand: Stand, path: str, dtype: str) -> Target:
    """`transformers serve` with a cache and a batch of the size that `continuous` has."""
    port = free_port()
    options = ["--device", "cpu", "--dtype", dtype, "--port", str(port), "--continuous-batching"]
    options += ["--cb-num-blocks", "256", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    command = [str(installed("transformers") / "transformers"), "serve", path, *options]
    target = start_peer(stand, TRANSFORMERS, command, port, path)
    target.more = {}  # it has no `stream_options`, and always says what was used
    return target


def start_vllm(stand: Stand, path: str, dtype: str, name: str, *more: str) -> Target:
    """vLLM's own server. Its command `vllm` asks for the version of a package `vllm`, which vllm-cpu is not."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, "--dtype", dtype]
    options += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "32", "--enforce-eager"]
    command = [str(installed("vllm") / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    return start_peer(stand, VLLM, [*command, *options, *more], port, name)


def start_gateway(stand: Stand, name: str, model: str, engine: dict[str, Any], process: int) -> Target:
    """A gateway with everything on before an engine."""
    port = free_port()
    limits = {"waiting": 1000, "queue_seconds": 1800, "answer_seconds": 1800}
    server = stand.gateway(name, [PYTHON, "-m", "llmserve"], port, engines={model: engine}, limits=limits)
    beside = {each: server.processes[each] for each in ("audit writer", "Redis") if each in server.processes}
    processes = {ENGINE: process, "gateway": server.processes["itself"]} | beside
    return Target(name, port, stand.key, model, processes)


def targets(stand: Stand, model: dict[str, Any], peers: list[str]) -> list[Target]:
    """The available peers: `transformers serve`, and vLLM alone and behind our gateway."""
    path = model["path"]
    name = Path(path).name
    for absent in [peer for peer in peers if not installed(peer).exists()]:
        skip(f"{absent}: not there, `make peers PEER={absent}` installs it")
        peers = [peer for peer in peers if peer != absent]
    if not peers:
        return []
    stand.start_redis()
    stand.start_writer()
    found = []
    if "transformers" in peers:
        stand.start_engine(name, **model)
        engine = {"socket": str(stand.folder / "engine.sock")}
        found.append(start_gateway(stand, GATEWAY, name, engine, stand.started["engine"].pid))
        found.append(start_transformers(stand, path, model["dtype"]))
    if "vllm" in peers:
        vllm = start_vllm(stand, path, model["dtype"], name)
        url = f"http://127.0.0.1:{vllm.port}"
        remote = {"remote": {"url": url, "revision": "bench", "context": CONTEXT}}
        found += [vllm, start_gateway(stand, BEHIND, name, remote, vllm.processes[ENGINE])]
    return found


def measure(folder: Path, model: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and CPU ms a token by requests at once and server: the rounds."""
    results: dict[str, Any] = {}
    with Stand(folder) as stand:
        asked = targets(stand, model | {"threads": 1}, options.peer)
        turns = itertools.count()
        for target in asked:
            ask(target, 2, 4, next(turns))  # whatever is made at first use
        for count in options.concurrent:
            rates: dict[str, list[float]] = {target.name: [] for target in asked}
            cpu: dict[str, list[dict[str, float]]] = {target.name: [] for target in asked}
            for number in range(options.rounds):
                for target in asked[:: 1 if number % 2 == 0 else -1]:
                    rate, each = ask(target, count, options.tokens, next(turns))
                    rates[target.name].append(rate)
                    cpu[target.name].append(each)
                    said = f"{rate:.1f} tokens/s, CPU {sum(each.values()):.1f} ms a token"
                    print(f"{count} at once, round {number + 1}: {target.name} {said}", file=sys.stderr)
            results[str(count)] = {"tokens_per_second": rates, "cpu_ms_per_token": cpu}
    return results


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    heads = [
        "model",
        "at once",
        "server",
        "tokens/s",
        "engine's CPU ms a token",
        "what we add",
        "of the engine's",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    notes = []
    for model, by_count in results.items():
        for count, each in by_count.items():
            rates = {name: statistics.median(rounds) for name, rounds in each["tokens_per_second"].items()}
            for name, rounds in each["cpu_ms_per_token"].items():
                engine = statistics.median(one[ENGINE] for one in rounds)
                added = statistics.median(sum(one.values()) - one[ENGINE] for one in rounds)
                cells = [model, count, name, f"{rates[name]:.1f}", f"{engine:.2f}"]
                cells += [f"{added:.2f}", f"{added / engine:.1%}"] if len(rounds[0]) > 1 else ["", ""]
                lines.append(f"| {' | '.join(cells)} |")
            if TRANSFORMERS in rates:
                share = rates[GATEWAY] / rates[TRANSFORMERS]
                notes.append(
                    f"{model}, {count} at once: {share:.2f} of {TRANSFORMERS} (budget {SHARE_OF_TRANSFORMERS})"
                )
            if VLLM in rates:
                notes.append(
                    f"{model}, {count} at once: budget of what we add to vLLM's CPU: {ADDED_CPU:.0%}"
                )
    return "\n".join([*lines, "", *notes])
