"""The OpenAPI document is correct: schemathesis sends what it allows and what it forbids, and checks the responses."""

import os
import subprocess
import sys
from pathlib import Path

from redis_server import PASSWORD, RedisServer
from service import running

from llmserve.local_run import free_port

CASES_A_PHASE = 10  # per operation, in addition to the boundaries of every field
SECONDS = 120


def test_schemathesis_finds_nothing(redis_server: RedisServer, tmp_path: Path) -> None:
    redis, password = {**redis_server.settings, "deadline_ms": 5000}, {"redis.gateway": PASSWORD}
    with (
        free_port() as port,
        running(tmp_path, listen={"port": port}, redis=redis, credentials=password) as service,
    ):
        result = subprocess.run(
            [
                sys.executable,
                *("-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"),
                *("--header", f"Authorization: Bearer {service.key}", "--checks", "all"),
                # This check removes the key, but --header adds it again; `ignored_auth` sends requests without one.
                *("--exclude-checks", "missing_required_header"),
                *("--phases", "coverage,fuzzing", "--max-examples", str(CASES_A_PHASE)),
                *("--seed", "5", "--no-color", "--generation-database", "none"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            cwd=tmp_path,
            env={
                **os.environ,
                "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
                "PYTHONPATH": str(Path(__file__).parents[2] / "helpers"),
            },
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        counts = service.metrics()
    for route in "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses":
        assert counts[f'llm_requests_total{{route="{route}",status="200"}}'] >= CASES_A_PHASE
        assert counts[f'llm_requests_total{{route="{route}",status="400"}}'] >= CASES_A_PHASE
    assert counts['llm_requests_total{route="/v1/usage",status="200"}'] >= 1
    failed = {name: times for name, times in counts.items() if "_total" in name and 'status="500"' in name}
    assert failed
    assert not any(failed.values())
