"""This host's Elasticsearch, asked by the program that role elasticsearch installs, which reads the sealed passwords."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

PROGRAM = "/usr/local/lib/llmkeep/elasticsearch-request"
ADDRESS = "/etc/llmkeep/elasticsearch.address"


def there() -> bool:
    """Is the program installed? On a fresh host in check mode it is not."""
    return Path(PROGRAM).exists()


def ask(
    method: str, path: str, body: Any = None, user: str = "elastic", until: str = "^[1-4]", seconds: int = 60
) -> tuple[int, Any]:
    """Status and JSON of the answer; the BODY goes through a pipe, since it may have a password.

    Asks again for SECONDS until the answer matches UNTIL: Elasticsearch says 503 while it starts. Refused if none does.
    """
    words = [PROGRAM, "--as", user, "--until", until, str(seconds), method, path]
    done = subprocess.run(
        words if body is None else [*words, "-"],
        input=None if body is None else json.dumps(body),
        capture_output=True,
        text=True,
        check=False,
    )
    output = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise Refused(
            f"{method} {path}: no answer within {seconds} s: {output}. See `journalctl -u elasticsearch`"
        )
    status, _, text = output.partition(" ")
    try:
        return int(status), json.loads(text) if text else None
    except ValueError as problem:
        raise Refused(
            f"{method} {path}: what answered is not Elasticsearch: {output}. See {ADDRESS}, and what listens there"
        ) from problem


def do(method: str, path: str, body: Any = None, user: str = "elastic") -> Any:
    """JSON of the answer; Refused if the request failed."""
    status, answer = ask(method, path, body, user)
    if not 200 <= status < 300:
        raise refusal(method, path, status, answer)
    return answer


def document(path: str) -> Any:
    """JSON of what is at this path, None where nothing is; Refused at any other answer."""
    status, answer = ask("GET", path)
    if status not in (200, 404):
        raise refusal("GET", path, status, answer)
    return answer if status == 200 else None


def refusal(method: str, path: str, status: int, answer: Any) -> Refused:
    return Refused(f"{method} {path}: Elasticsearch answered {status}: {json.dumps(answer)}")


def has(actual: Any, expected: Any) -> bool:
    """Is ACTUAL the EXPECTED one, but for keys of objects that Elasticsearch adds?"""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            has(actual.get(key), value) for key, value in expected.items()
        )
    if isinstance(expected, list) and isinstance(actual, list) and len(actual) == len(expected):
        return all(has(there, here) for there, here in zip(actual, expected, strict=True))
    return bool(actual == expected)
