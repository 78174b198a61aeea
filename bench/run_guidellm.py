#!/usr/bin/python3.13
"""Runs unmodified guidellm against the gateway with everything enabled and the `echo` engine: 16 concurrent chat streams.

Its settings are its defaults. The output is its report: requests by outcome, and medians and 99th percentiles. The client shares
the machine, so look at the outcomes.

Needs `make env`, redis-server, and `make peers PEER=guidellm`. Exit code 0, or 1 if a request was not answered.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stand import PYTHON, ROOT, Stand, free_port, skip

GUIDELLM = ROOT / "bench/.venv-guidellm/bin/python"
WORDS = "Tell me in a few words what the capital of France is, and why"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def scenario(folder: Path, port: int, key: str, options: argparse.Namespace) -> Path:
    """What to do, as guidellm's `--config` wants it: the key stands in a file, not in an argument."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{WORDS}, {number}?"}) + "\n" for number in range(1000))
    )
    described = {
        "backend": {
            "kind": "openai_http",
            "target": f"http://127.0.0.1:{port}",
            "model": "echo",
            "api_key": key,
        },
        "data": [{"kind": "json_file", "path": str(prompts), "load_kwargs": {"split": "train"}}],
        "profile": {"kind": "concurrent", "streams": [options.streams]},
        "constraints": [{"kind": "max_requests", "count": options.requests}],
        "outputs": [{"kind": "json", "path": str(folder / "report.json")}],
    }
    file = folder / "scenario.json"
    file.touch(0o600)
    file.write_text(json.dumps({"spec": described}))
    return file


def summary(report: Path) -> dict[str, Any]:
    """Of a report's only benchmark: requests by outcome, and what they took."""
    benchmark = json.loads(report.read_text())["benchmarks"][0]
    metrics = benchmark["metrics"]

    def of(name: str) -> dict[str, float]:
        spread = metrics[name]["successful"]
        return {"median": spread["median"], "p99": spread["percentiles"]["p99"]}

    return {
        "requests": metrics["request_totals"],
        "requests_per_second": metrics["requests_per_second"]["successful"]["mean"],
        "time_to_first_token_ms": of("time_to_first_token_ms"),
        "output_tokens": of("output_token_count"),
        "errors": sorted({str(each["info"]["error"]) for each in benchmark["requests"]["errored"]})[:3],
    }


def main() -> int:
    """Run it and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--streams", type=int, default=16, help="at once")
    options = parser.parse_args()
    if not GUIDELLM.exists():
        skip("guidellm is not there: `make peers PEER=guidellm` installs it")
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-guidellm-") as name, Stand(Path(name)) as stand:
        stand.start_redis()
        stand.start_writer()
        stand.start_engine()
        port = free_port()
        stand.gateway("gateway", [PYTHON, "-m", "llmserve"], port)
        config = scenario(stand.folder, port, stand.key, options)
        command = [
            str(GUIDELLM),
            "-m",
            "guidellm",
            "run",
            "--config",
            str(config),
            "--disable-console-interactive",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=stand.folder, env=OFFLINE | {"HOME": name})
        found = summary(stand.folder / "report.json")
    print(json.dumps(found, indent=2))
    return 0 if found["requests"]["successful"] == found["requests"]["total"] else 1


if __name__ == "__main__":
    sys.exit(main())
