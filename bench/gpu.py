"""Run by bench/gpu.sh: runs benchmarks of this folder one after the other, each in a separate process with a time limit. A part
that fails or takes too long only loses its own figures. Results are written after each part.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stand import PYTHON, ROOT

REHEARSAL = "cpu, a rehearsal: tiny models, no figure of a GPU"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
PATIENCE = 10  # times as long may a rehearsal take, beside other work
PARTS = ("train", "quantized", "gateway", "health")


@dataclass(frozen=True)
class Run:
    """A benchmark: its part, its name in the results, what it needs, its seconds at most, and its command."""

    part: str
    name: str
    needs: tuple[str, ...]
    limit: int
    command: tuple[object, ...]


def plan(where: Path, out: Path, rehearse: bool, parts: tuple[str, ...]) -> list[Run]:
    """Those of `parts`, in order, after the models that they need, which are made in `where`."""
    device = "cpu" if rehearse else "cuda"
    bench = ROOT / "bench"
    model = bench / "serving/random_llama.py"
    trained = {"lora": "tiny" if rehearse else "3b", "full": "tiny" if rehearse else "1b"}
    served = "57m" if rehearse else "1b-bytes"
    rows = ("--seq-len", 64, "--steps", 5) if rehearse else ("--seq-len", 2048, "--steps", 15)
    train = [
        Run(
            "train",
            f"train {method}",
            ("peft", "accelerate"),
            150,
            (
                *(
                    PYTHON,
                    bench / "sft.py",
                    "--json",
                    "--whole-only",
                    "--turns",
                    1,
                    *rows,
                    "--device",
                    device,
                ),
                *("--method", method, "--model", where / size, "--checkpointing"),
            ),
        )
        for method, size in trained.items()
    ]
    counts = (1,) if rehearse else (1, 8)
    quantized = (
        *(PYTHON, bench / "engines.py", "--json", "--device", device, "--model", where / served),
        *("--quantization", "int8", "nf4", "--rounds", 1 if rehearse else 2, "--concurrent", *counts),
        *("--tokens", 8 if rehearse else 64),
    )
    streams = (1, 4) if rehearse else (1, 16, 64)
    gateway = (
        *(PYTHON, bench / "first_token.py", "--json", "--device", device, "--model", where / served),
        *("--streams", *streams, "--requests", 8 if rehearse else 64, "--tokens", 4 if rehearse else 16),
    )
    health = (
        *(PYTHON, bench / "gpu_health.py", "--json", "--transcript", out / "nvml.json"),
        *(("--seconds", 5) if rehearse else ("--seconds", 40, "--real")),
    )
    chosen = [
        *train,
        Run("quantized", "quantized", ("bitsandbytes", "accelerate"), 150, quantized),
        Run("gateway", "gateway", ("uvicorn", "pydantic", "opa_bindings", "cryptography"), 150, gateway),
        Run("health", "health", ("pynvml", "pydantic"), 90, health),
    ]
    chosen = [run for run in chosen if run.part in parts]
    sizes = [
        size for size in {*trained.values(), served} if any(where / size in run.command for run in chosen)
    ]
    made = [
        Run("models", f"model {size}", (), 120, (PYTHON, model, where / size, size)) for size in sorted(sizes)
    ]
    return [*made, *chosen]


def measured(run: Run, log: Path, limit: int) -> dict[str, Any]:
    """The last output of a benchmark as JSON, or the reason why there is none. It may take `limit` seconds."""
    if absent := [name for name in run.needs if find_spec(name) is None]:
        return {"skipped": f"{', '.join(absent)} not installed"}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/payload:{ROOT}/payload/tests/helpers:{ROOT}"}
    with log.open("a") as told:
        print(f"--- {run.name}", file=told, flush=True)
        process = subprocess.Popen(
            [str(each) for each in run.command],
            stdout=subprocess.PIPE,
            stderr=told,
            env=environment,
            text=True,
            start_new_session=True,  # engines, gateways and ranks are ended with it
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {limit} s; see log"}
        finally:
            end(process)
    told_last = next((line for line in reversed(printed.splitlines()) if line.startswith("{")), "")
    if process.returncode and not told_last:
        return {
            "failed": f"exit code {process.returncode}; see log",
            "last": log.read_text().splitlines()[-3:],
        }
    return {"exit_code": process.returncode, "found": json.loads(told_last or "{}")}


def end(process: subprocess.Popen[str]) -> None:
    """End it and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        time.sleep(1)
    process.wait()


def card() -> str:
    """Name, memory and driver of the GPU."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
        "--id=0",
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """The versions of the libraries that compute."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(results: dict[str, Any]) -> str:
    """For docs/develop/performance.md."""
    heading = REHEARSAL if results["device"] == REHEARSAL else "measured"
    words = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"**{results['device']}**, {results['time']}; {words}.",
        "",
        f"| what | {heading} |",
        "|---|---|",
    ]
    for name, run in results["runs"].items():
        for word in ("skipped", "failed"):
            if word in run:
                lines.append(f"| {name} | {word}: {run[word]} |")
        if found := run.get("found"):
            try:
                lines += [f"| {what} | {value} |" for what, value in rows(name, found)]
            except (
                KeyError,
                TypeError,
                ValueError,
            ) as error:  # the other parts have their lines nevertheless
                lines.append(f"| {name} | see results.json: {type(error).__name__}: {error} |")
            if run["exit_code"]:
                lines.append(f"| {name} | **exit code {run['exit_code']}**: see log |")
    return "\n".join(lines) + "\n"


def rows(name: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of one benchmark."""
    if name.startswith("train"):
        return training_rows(name, found)
    if name == "quantized":
        return quantized_rows(found)
    if name == "gateway":
        kind = f"gateway, engine `{found['driver']}`, Redis {'beside' if found['redis'] else 'absent'}"
        return [
            (
                f"{kind}: time to first token, {streams} streams",
                f"P50 {each['p50_ms']:.0f} ms, P99 {each['p99_ms']:.0f} ms",
            )
            for streams, each in found["streams"].items()
        ]
    if name == "health":
        check, cost = found["check"], found["healthy"]["cpu_ms_per_gpu_and_minute"]
        said = (
            f"accepted: {check['accepted']}, {len(check['findings'])} findings"
            if "gpus" in check
            else check["error"]
        )
        return [
            (f"`llm-gpu check --json`, {found['library']}", said),
            (f"`llm-gpu watch`, {found['library']}", f"{cost:.1f} ms CPU a GPU and minute"),
        ]
    return []


def training_rows(name: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """llm-train, and TRL beside it."""
    own, medians, unit = found["runs"]["llm-train"][0], found["medians"], found["unit"]
    mfu = f", MFU {own['mfu']:.1%}" if own["mfu"] else ""
    peak, planned = own["peak_gb"], own["planned_gb"]
    told = [
        (f"{name}, llm-train", f"{medians['llm-train']:,.0f} {unit}{mfu}"),
        (f"{name}, peak; planned", f"{peak:.2f} GB; {planned:.2f} GB ({planned / peak - 1:+.0%})"),
    ]
    if "trl" in medians:
        told.append(
            (
                f"{name}, TRL",
                f"{medians['trl']:,.0f} {unit}, peak {found['runs']['trl'][0]['peak_gb']:.2f} GB",
            )
        )
        told.append((f"{name}, llm-train / TRL", f"{medians['llm-train'] / medians['trl']:.2f}"))
    else:
        told.append((f"{name}, TRL", "not installed, or it failed: see log"))
    return told


def quantized_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Each against bfloat16."""
    told = []
    for by_count in found.values():
        for count, modes in by_count.items():
            base = modes["bfloat16"]
            for mode, each in modes.items():
                rate, whole = sorted(each["tokens_per_second"])[-1], sorted(base["tokens_per_second"])[-1]
                size, of = each.get("gpu_bytes", each["bytes"]), base.get("gpu_bytes", base["bytes"])
                value = f"{rate:.1f} tokens/s ({rate / whole:.2f} of bfloat16), {size / 1e9:.2f} GB ({size / of:.2f})"
                told.append((f"`naive`, {count} requests at once, {mode}", value))
    return told


def main() -> int:
    """Run, write and print."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / ".lab/gpu")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    options = parser.parse_args()
    parts = options.part or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: take {', '.join(PARTS)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log").unlink(missing_ok=True)
    results: dict[str, Any] = {
        "device": REHEARSAL if options.rehearse else card(),
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": versions(),
        "runs": {},
    }
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        for run in plan(Path(name), out, options.rehearse, tuple(parts)):
            begun = time.monotonic()
            results["runs"][run.name] = measured(
                run, out / "log", run.limit * (PATIENCE if options.rehearse else 1)
            ) | {"seconds": round(time.monotonic() - begun, 1)}
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (out / "table.md").write_text(table(results))
            print(f"{run.name}: {results['runs'][run.name]['seconds']} s", file=sys.stderr, flush=True)
    print((out / "table.md").read_text())
    return int(any("failed" in each or each.get("exit_code") for each in results["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
