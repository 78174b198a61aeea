"""guidellm by its scenarios: synthetic data, a conversation of two turns, calls of a tool."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from steps import TOOL, Server, run


def benchmark(server: Server, backend: dict[str, Any], data: dict[str, Any]) -> None:
    """Run a scenario; raises RuntimeError if one of its requests fails, or none succeeds."""
    with tempfile.TemporaryDirectory() as name:
        report, scenario = Path(name) / "report.json", Path(name) / "scenario.json"
        spec = {
            "backend": {"kind": "openai_http", "target": server.url, "api_key": server.key, **backend},
            "tokenizer": {"kind": "huggingface_auto", "model": os.environ["TOKENIZER"]},
            "data": [{"kind": "synthetic_text", "prompt_tokens": 32, "output_tokens": 8, **data}],
            "profile": {"kind": "synchronous"},
            "constraints": [{"kind": "max_requests", "count": 2}],
            "outputs": [{"kind": "json", "path": str(report)}],
        }
        scenario.touch(0o600)
        scenario.write_text(json.dumps({"spec": spec}))
        command = [
            sys.executable,
            "-m",
            "guidellm",
            "run",
            "--disable-console-interactive",
            "--config",
            scenario,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        requests = json.loads(report.read_text())["benchmarks"][0]
    totals = requests["metrics"]["request_totals"]
    if not totals["successful"] or totals["errored"]:
        errors = {str(each["info"]["error"]) for each in requests["requests"]["errored"]}
        raise RuntimeError(f"{totals['errored']} requests failed: {errors}")


def list_models(server: Server) -> None:
    """Without a model it asks for the first one of the server."""
    benchmark(server, {}, {})


def answer(server: Server) -> None:
    benchmark(server, {"model": server.model, "stream": False}, {})


def stream(server: Server) -> None:
    benchmark(server, {"model": server.model}, {})


def second_turn(server: Server) -> None:
    benchmark(server, {"model": server.model}, {"turns": 2})


def tool_loop(server: Server) -> None:
    benchmark(server, {"model": server.model}, {"tool_call_turns": 1, "tools": [TOOL]})


def responses(server: Server) -> None:
    backend = {"model": server.model, "request_format": "/v1/responses"}
    benchmark(server, backend, {"tool_call_turns": 1, "tools": [TOOL]})


if __name__ == "__main__":
    run(["guidellm"], list_models, answer, stream, second_turn, tool_loop, responses)
