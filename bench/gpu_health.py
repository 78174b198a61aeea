#!/usr/bin/python3.13
"""CPU time of `llm-gpu watch`: eight simulated GPUs, a reading every 10 s, a scrape every 15 s; then during a storm of Xids.

On the stand-in for NVIDIA's library (tests/doubles/nvml), which looks for events every 100 ms at this process's cost; a
real driver waits in the kernel, but its readings cost what it takes for them. Exit code 0, or 1 if over budget.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GPUS, SCRAPE_SECONDS, BUDGET_MS = 8, 15.0, 10.0


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(folder: Path, lines: str, seconds: float) -> tuple[float, int]:
    """CPU milliseconds a GPU and minute, and resident bytes, once the first reading is made."""
    (folder / "gpus.txt").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {"expect": {"count": GPUS}, "metrics_port": port}
    config |= {name: str(folder / f"{name}.json") for name in ("state", "orders")}
    (folder / "gpu.yaml").write_text(json.dumps(config))
    watch = subprocess.Popen(
        [ROOT / "payload/.venv/bin/python", "-m", "llmgpu", "watch", "--config", folder / "gpu.yaml"],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "MOCK_NVML_CONFIG": str(folder / "gpus.txt")},
        stderr=subprocess.DEVNULL,
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
        return used * 1000 * 60 / (time.monotonic() - began) / GPUS, resident(watch.pid)
    finally:
        watch.terminate()
        watch.wait()


def main() -> int:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run (default: %(default)s)")
    given = parser.parse_args()
    over = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([ROOT / "tests/doubles/nvml/build.sh", folder], check=True)
        for what, lines in (
            ("healthy", ""),
            ("storm: 1,000 Xids of each GPU", "xid = 13\nxid_times = 1000\n"),
        ):
            cost, memory = measured(folder, lines, given.seconds)
            over |= not lines and cost > BUDGET_MS
            print(f"{what}: {cost:.1f} ms CPU a GPU and minute (stand-in), {memory / 1e6:.0f} MB resident")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
