#!/usr/bin/python3.13
"""CPU time of `llm-gpu watch`: eight simulated GPUs, a reading every 10 s, a scrape every 15 s; then during a storm of Xids.

On the stand-in for NVIDIA's library (tests/doubles/nvml), which polls for events every 100 ms in this process; a real driver
waits in the kernel, but its readings have their own cost: --real reads this machine's own GPUs, without the storm. --json also
includes the output of `llm-gpu check --json`. Exit code 0, or 1 if over budget.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from stand import PYTHON, ROOT

GPUS, SCRAPE_SECONDS, BUDGET_MS = 8, 15.0, 10.0
UUID = re.compile(r"GPU-[0-9a-f-]{36}")


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_count() -> int:
    """GPUs that this machine's driver lists."""
    listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    return listed.count("GPU ")


def configured(folder: Path, gpus: int) -> tuple[Path, int]:
    """The configuration of `llm-gpu` for `gpus` GPUs, and the port of its metrics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {"expect": {"count": gpus}, "metrics_port": port}
    config |= {name: str(folder / f"{name}.json") for name in ("state", "orders")}
    (folder / "gpu.yaml").write_text(json.dumps(config))
    return folder / "gpu.yaml", port


def standin(folder: Path) -> dict[str, str]:
    """The environment of a process that is to read the stand-in, which is compiled here."""
    subprocess.run([ROOT / "tests/doubles/nvml/build.sh", folder], check=True)
    (folder / "gpus.txt").write_text("")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "MOCK_NVML_CONFIG": str(folder / "gpus.txt")}


def measured(
    folder: Path, lines: str, seconds: float, gpus: int, environment: dict[str, str]
) -> tuple[float, int]:
    """CPU milliseconds a GPU and minute, and resident bytes, once the first reading is made."""
    config, port = configured(folder, gpus)
    watch = subprocess.Popen(
        [PYTHON, "-m", "llmgpu", "watch", "--config", config], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(5)
        before, began = cpu_seconds(watch.pid), time.monotonic()
        (folder / "gpus.txt").write_text(lines)
        while (elapsed := time.monotonic() - began) < seconds:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                answer.read()
            time.sleep(min(SCRAPE_SECONDS, seconds - elapsed))
        used = cpu_seconds(watch.pid) - before
        return used * 1000 * 60 / (time.monotonic() - began) / gpus, resident(watch.pid)
    finally:
        watch.terminate()
        watch.wait()


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run (default: %(default)s)")
    parser.add_argument("--real", action="store_true", help="the GPUs of this machine, not the stand-in")
    parser.add_argument("--transcript", type=Path, help="write what NVML answers to a reading into this file")
    parser.add_argument("--json", action="store_true", help="one JSON document, with `llm-gpu check --json`")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = dict(os.environ) if given.real else standin(folder)
        gpus = gpu_count() if given.real else GPUS
        library = "NVML" if given.real else "stand-in"
        runs = {"healthy": ""}
        if not given.real:
            runs["storm: 1,000 Xids of each GPU"] = "xid = 13\nxid_times = 1000\n"
        if given.transcript:
            program = str(ROOT / "bench/serving/nvml_transcript.py")
            subprocess.run([PYTHON, program, "record", given.transcript], check=True, env=environment)
        if given.json:
            check = [
                PYTHON,
                "-m",
                "llmgpu",
                "check",
                "--cuda",
                "--json",
                "--config",
                str(configured(folder, gpus)[0]),
            ]
            checked = subprocess.run(check, check=False, capture_output=True, text=True, env=environment)
            told = UUID.sub("GPU-not-published", checked.stdout)
            found["check"] = json.loads(told) if told else {"error": checked.stderr}
        for what, lines in runs.items():
            cost, memory = measured(folder, lines, given.seconds, gpus, environment)
            found[what] = {"cpu_ms_per_gpu_and_minute": cost, "resident_bytes": memory}
            if not given.json:
                print(
                    f"{what}: {cost:.1f} ms CPU a GPU and minute ({library}), {memory / 1e6:.0f} MB resident"
                )
    if given.json:
        print(json.dumps({"library": library, "gpus": gpus, **found}))
    over = found["healthy"]["cpu_ms_per_gpu_and_minute"] > BUDGET_MS
    if over:
        print(f"healthy: over the budget of {BUDGET_MS:g} ms CPU a GPU and minute", file=sys.stderr)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
