#!/usr/bin/python3.13
"""What batching brings: tokens a second of `continuous` beside `naive`, the same requests at once, in turns.

Each engine is a process of its own with the model, asked over its socket without a gateway; while one
answers the other idles. CPU a token is what to compare where the machine does other work too. Answers are greedy, and
compared: in float32 both engines must say the same. The models are those in the directories named (SmolLM2: `make bundle` leaves
it in .lab/bundle/models), or else a random Llama of 57 M parameters, made here.

With --peer, instead: `continuous` behind the gateway beside other servers of OpenAI's API, see engine_peers.py.

Needs `make env`, and for the peers `make peers PEER=vllm`. Exit code 0, or 1 if an answer failed or two in float32 differ.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_peers
import plot
from stand import PYTHON, ROOT, cpu_seconds

DRIVERS = ("naive", "continuous")
START_SECONDS = 300


@dataclass
class Engine:
    """A running one."""

    driver: str
    process: subprocess.Popen[bytes]
    socket: Path


def described(folder: Path, driver: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The model, as an engine's configuration names it; its manifest is written into `folder`."""
    manifest = folder / f"{driver}.sha256"
    lines = (f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(model.iterdir()))
    manifest.write_text("".join(lines))
    return {
        "driver": driver,
        "path": str(model),
        "manifest": str(manifest),
        "dtype": options.dtype,
        "threads": options.threads,
        "quantization": options.quantization,
        **({"slots": 32, "cache_tokens": 8192} if driver == "continuous" else {}),
    }


def start(folder: Path, driver: str, model: Path, options: argparse.Namespace) -> Engine:
    """An engine that will listen soon."""
    path = folder / f"{driver}.sock"
    config = folder / f"{driver}.yaml"
    # JSON is YAML
    config.write_text(json.dumps({"socket": str(path), "model": described(folder, driver, model, options)}))
    command = [PYTHON, "-m", "llmserve", "engine", "--name", "model", "--config", str(config)]
    with (folder / f"{driver}.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    return Engine(driver, process, path)


def connect(engine: Engine) -> Any:
    """Its socket's file, once it listens."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and engine.process.poll() is None:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(str(engine.socket))
        except OSError:
            time.sleep(0.1)
            continue
        file = link.makefile("rwb")
        file.readline()  # who it is
        return file
    raise SystemExit(
        f"the engine {engine.driver} does not listen: {engine.socket.with_suffix('.log').read_text()}"
    )


def ask(engine: Engine, file: Any, count: int, tokens: int) -> tuple[float, float, list[str]]:
    """Ask all at once: tokens a second, CPU seconds a token, and the answers."""
    before, used = time.monotonic(), cpu_seconds(engine.process.pid)
    for number, prompt in enumerate(engine_peers.prompts(count)):
        request = {"kind": "generate", "id": number, "stream": False, "max_tokens": tokens}
        file.write(json.dumps({**request, "prompt": prompt, "temperature": 0}).encode() + b"\n")
    file.flush()
    answers, total = [""] * count, 0
    for _ in range(count):
        answer = json.loads(file.readline())
        if answer["kind"] != "done":
            raise SystemExit(f"an answer failed: {answer}")
        answers[answer["id"]] = answer["text"]
        total += answer["completion_tokens"]
    seconds = time.monotonic() - before
    return total / seconds, (cpu_seconds(engine.process.pid) - used) / total, answers


def measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second by requests at once and driver: the rounds, and how many answers agree."""
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as name:
        engines = [start(Path(name), each, model, options) for each in DRIVERS]
        try:
            files = {engine.driver: connect(engine) for engine in engines}
            for engine in engines:
                ask(engine, files[engine.driver], 1, 4)  # whatever is made at first use
            results: dict[str, Any] = {}
            for count in options.concurrent:
                rates: dict[str, list[float]] = {each: [] for each in DRIVERS}
                cpu: dict[str, list[float]] = {each: [] for each in DRIVERS}
                answers: dict[str, list[str]] = {}
                for number in range(options.rounds):
                    for engine in engines if number % 2 == 0 else engines[::-1]:
                        driver = engine.driver
                        rate, each, answers[driver] = ask(engine, files[driver], count, options.tokens)
                        rates[driver].append(rate)
                        cpu[driver].append(each * 1000)
                        print(
                            f"{count} at once, round {number + 1}: {driver} {rate:.1f}, {each * 1000:.0f} ms",
                            file=sys.stderr,
                        )
                pairs = zip(answers["naive"], answers["continuous"], strict=True)
                agree = sum(one == other for one, other in pairs)
                results[str(count)] = {"tokens_per_second": rates, "cpu_ms_per_token": cpu, "agree": agree}
        finally:
            for engine in engines:
                engine.process.kill()
                engine.process.wait()
    return results


def table(results: dict[str, Any]) -> str:
    """For people, in Markdown."""
    heads = ["model", "at once", *(f"{driver} tokens/s" for driver in DRIVERS), "factor"]
    heads += [*(f"{driver} CPU ms a token" for driver in DRIVERS), "factor", "answers that agree"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for model, by_count in results.items():
        for count, each in by_count.items():
            naive, continuous = (statistics.median(each["tokens_per_second"][driver]) for driver in DRIVERS)
            cells = [model, count, f"{naive:.1f}", f"{continuous:.1f}", f"{continuous / naive:.2f}"]
            naive, continuous = (statistics.median(each["cpu_ms_per_token"][driver]) for driver in DRIVERS)
            cells += [f"{naive:.0f}", f"{continuous:.0f}", f"{naive / continuous:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {each['agree']} of {count} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a directory; without one, a random Llama"
    )
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="of each engine, in turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"], default="none")
    parser.add_argument(
        "--peer", action="append", choices=engine_peers.PEERS, default=[], help="instead: beside this server"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--plot", type=Path, help="an SVG of the tokens a second")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-model-") as name:
        models = options.model
        if not models:
            models = [Path(name) / "random-llama-57m"]
            maker = [PYTHON, str(ROOT / "bench/serving/random_llama.py"), str(models[0])]
            subprocess.run(maker, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "payload/tests")})
        for model in models:
            if options.peer:
                with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
                    continuous = described(Path(folder), "continuous", model.resolve(), options)
                    results[model.name] = engine_peers.measure(Path(folder), continuous, options)
            else:
                results[model.name] = measure(model.resolve(), options)
    made = engine_peers.table if options.peer else table
    print(json.dumps(results) if options.json else made(results))
    if options.plot:
        bars = {
            f"{model}, {count} at once": {
                name: statistics.median(rates) for name, rates in each["tokens_per_second"].items()
            }
            for model, by in results.items()
            for count, each in by.items()
        }
        plot.draw(options.plot, "Tokens a second", "tokens/s", bars)
    if options.peer:
        return 0
    same = all(each["agree"] == int(count) for by in results.values() for count, each in by.items())
    return 0 if same or options.dtype != "float32" else 1  # in bfloat16 a batch adds up otherwise


if __name__ == "__main__":
    sys.exit(main())
