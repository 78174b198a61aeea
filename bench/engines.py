#!/usr/bin/python3.13
"""Measures the gain of batching: tokens per second of `continuous` compared with `naive`, with the same concurrent requests, in
turns. With `--quantization`, the gain or cost of 8 and 4 bits: one driver in float32, in bfloat16, and in each of them; on a GPU
(`--device cuda`, `naive` alone) without float32, and with the GPU memory that each takes.

Each engine is a separate process with the model, queried over its socket without a gateway; while one answers, the other idles.
Compare CPU per token if the machine does other work. Answers are greedy and compared: in float32 both engines must give the same
answers. The models are those in the directories named (SmolLM2: `make bundle` leaves it in .lab/bundle/models), or else a random
Llama of 57 M parameters, made here. Bytes are those of the weights, without scales.

With --peer, instead: `continuous` behind the gateway compared with other servers of OpenAI's API, see engine_peers.py.

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

START_SECONDS = 300


@dataclass(frozen=True)
class Mode:
    """One way to run a model."""

    name: str
    driver: str
    dtype: str
    quantization: str = "none"


@dataclass
class Engine:
    """A running one."""

    mode: Mode
    process: subprocess.Popen[bytes]
    socket: Path
    gpu_bytes: int = 0

    def weight_bytes(self) -> int:
        """As it logs them."""
        log = self.socket.with_suffix(".log").read_text()
        lines = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
        loaded: dict[str, int] = next(line["bytes"] for line in lines if line["message"] == "weights loaded")
        return sum(loaded.values())


def modes(options: argparse.Namespace) -> list[Mode]:
    """What to compare with the first."""
    if not options.quantization:
        return [Mode(driver, driver, options.dtype) for driver in ("naive", "continuous")]
    dtypes = ("float32", "bfloat16") if options.device == "cpu" else ("bfloat16",)
    whole = [Mode(dtype, options.driver, dtype) for dtype in dtypes]
    return whole + [Mode(each, options.driver, "bfloat16", each) for each in options.quantization]


def described(folder: Path, mode: Mode, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The model, as an engine's configuration names it; its manifest is written into `folder`."""
    manifest = folder / f"{mode.name}.sha256"
    lines = (f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(model.iterdir()))
    manifest.write_text("".join(lines))
    return {
        "driver": mode.driver,
        "path": str(model),
        "manifest": str(manifest),
        "dtype": mode.dtype,
        "threads": options.threads,
        "quantization": mode.quantization,
        **(
            {"slots": 32, "cache_tokens": 8192} if mode.driver == "continuous" else {"device": options.device}
        ),
    }


def start(folder: Path, mode: Mode, model: Path, options: argparse.Namespace) -> Engine:
    """An engine that will listen soon."""
    path = folder / f"{mode.name}.sock"
    config = folder / f"{mode.name}.yaml"
    # JSON is YAML
    config.write_text(json.dumps({"socket": str(path), "model": described(folder, mode, model, options)}))
    command = [PYTHON, "-m", "llmserve", "engine", "--name", "model", "--config", str(config)]
    with (folder / f"{mode.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    return Engine(mode, process, path)


def gpu_memory() -> int:
    """Bytes of the first GPU that are in use, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 2**20


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
        f"the engine {engine.mode.name} does not listen: {engine.socket.with_suffix('.log').read_text()}"
    )


def ask(engine: Engine, file: Any, count: int, tokens: int) -> tuple[float, float, list[str]]:
    """Send all questions concurrently: tokens per second, CPU seconds per token, and the answers."""
    before, used = time.monotonic(), cpu_seconds(engine.process.pid)
    for number, prompt in enumerate(engine_peers.prompts(count)):
        request = {"kind": "generate", "id": number, "stream": False, "max_tokens": tokens}
        file.write(json.dumps({**request, "prompt": prompt, "temperature": 0}).encode() + b"\n")
    file.flush()
    answers, total = [""] * count, 0
    for _ in range(count):
        while (answer := json.loads(file.readline()))["kind"] == "beat":
            pass
        if answer["kind"] != "done":
            raise SystemExit(f"an answer failed: {answer}")
        answers[answer["id"]] = answer["text"]
        total += answer["completion_tokens"]
    seconds = time.monotonic() - before
    return total / seconds, (cpu_seconds(engine.process.pid) - used) / total, answers


def measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """By requests at once and mode: tokens a second and CPU in each round, bytes, and answers that agree with the first."""
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as name:
        engines: list[Engine] = []
        files: dict[Mode, Any] = {}
        try:
            for mode in modes(options):
                before = gpu_memory() if options.device == "cuda" else 0
                engine = start(Path(name), mode, model, options)
                engines.append(engine)
                if options.device == "cuda":  # one after the other, which tells what each takes
                    files[mode] = connect(engine)
                    ask(engine, files[mode], 1, 4)
                    engine.gpu_bytes = gpu_memory() - before
            files |= {engine.mode: connect(engine) for engine in engines if engine.mode not in files}
            for engine in engines:
                ask(engine, files[engine.mode], 1, 4)  # whatever is made at first use
            results: dict[str, Any] = {}
            for count in options.concurrent:
                by_mode: dict[str, Any] = {}
                answers: dict[Mode, list[str]] = {}
                for engine in engines:
                    seen = {"tokens_per_second": [], "cpu_ms_per_token": [], "bytes": engine.weight_bytes()}
                    by_mode[engine.mode.name] = seen | (
                        {"gpu_bytes": engine.gpu_bytes} if engine.gpu_bytes else {}
                    )
                for number in range(options.rounds):
                    for engine in engines if number % 2 == 0 else engines[::-1]:
                        mode = engine.mode
                        rate, each, answers[mode] = ask(engine, files[mode], count, options.tokens)
                        by_mode[mode.name]["tokens_per_second"].append(rate)
                        by_mode[mode.name]["cpu_ms_per_token"].append(each * 1000)
                        told = f"{rate:.1f} tokens/s, {each * 1000:.0f} ms"
                        print(f"{count} at once, round {number + 1}: {mode.name} {told}", file=sys.stderr)
                for mode, texts in answers.items():
                    pairs = zip(answers[engines[0].mode], texts, strict=True)
                    by_mode[mode.name]["agree"] = sum(one == other for one, other in pairs)
                results[str(count)] = by_mode
        finally:
            for engine in engines:
                engine.process.kill()
                engine.process.wait()
    return results


def table(results: dict[str, Any]) -> str:
    """For people, in Markdown; factors are those to the first mode, above 1 where it is better."""
    heads = ["model", "at once", "", "tokens/s", "factor", "CPU ms a token", "factor", "bytes", "agree"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for model, by_count in results.items():
        for count, by_mode in by_count.items():
            first, base = 0.0, 0.0
            for mode, each in by_mode.items():
                rate = statistics.median(each["tokens_per_second"])
                cpu = statistics.median(each["cpu_ms_per_token"])
                first, base = first or rate, base or cpu
                cells = [
                    model,
                    count,
                    mode,
                    f"{rate:.1f}",
                    f"{rate / first:.2f}",
                    f"{cpu:.0f}",
                    f"{base / cpu:.2f}",
                ]
                lines.append(f"| {' | '.join(cells)} | {each['bytes']} | {each['agree']} of {count} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a directory; without one, a random Llama"
    )
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="of each engine, in turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of `naive`")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", choices=["int8", "nf4"], nargs="+", default=[])
    parser.add_argument(
        "--driver", choices=["naive", "continuous"], default="naive", help="for --quantization"
    )
    parser.add_argument(
        "--peer", action="append", choices=engine_peers.PEERS, default=[], help="instead: beside this server"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--plot", type=Path, help="an SVG of the tokens a second")
    options = parser.parse_args()
    if options.device == "cuda" and (options.driver != "naive" or not options.quantization):
        parser.error("--device cuda is for `naive` alone: say --quantization, and no other --driver")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-model-") as name:
        models = options.model
        if not models:
            models = [Path(name) / "random-llama-57m"]
            maker = [PYTHON, str(ROOT / "bench/serving/random_llama.py"), str(models[0])]
            subprocess.run(
                maker, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "payload/tests/helpers")}
            )
        for model in models:
            if options.peer:
                with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
                    mode = Mode("continuous", "continuous", options.dtype)
                    continuous = described(Path(folder), mode, model.resolve(), options)
                    results[model.name] = engine_peers.measure(Path(folder), continuous, options)
            else:
                results[model.name] = measure(model.resolve(), options)
    made = engine_peers.table if options.peer else table
    print(json.dumps(results) if options.json else made(results))
    if options.plot:
        bars = {}
        for model_name, by in results.items():
            for count, each in by.items():
                if options.peer:
                    rates = each["tokens_per_second"]
                else:
                    rates = {mode: seen["tokens_per_second"] for mode, seen in each.items()}
                bars[f"{model_name}, {count} at once"] = {
                    name: statistics.median(rounds) for name, rounds in rates.items()
                }
        plot.draw(options.plot, "Tokens a second", "tokens/s", bars)
    if options.peer or options.quantization or options.dtype != "float32":
        return 0  # fewer bits say something else, and in bfloat16 a batch adds up otherwise
    counts = [
        (count, each) for by in results.values() for count, by_mode in by.items() for each in by_mode.values()
    ]
    return 0 if all(each["agree"] == int(count) for count, each in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
