"""Requests that many tests send to a gateway with the engine `echo`, and helpers to read the answers."""

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
from service import Service

WORDS = " ".join(f"word{number}" for number in range(200))
STREAM = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": WORDS}]}
# 1000 tokens take a slow echo engine 50 s: for streams that are cut short, however long a busy machine takes to do so.
LASTING = {**STREAM, "messages": [{"role": "user", "content": "word " * 1000}], "max_tokens": 1000}
CHAT = "/v1/chat/completions"
GREEDY = {
    "model": "echo",
    "temperature": 0,
    "messages": [{"role": "user", "content": "one two"}],
}  # its answer is cached


def error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the error envelope; returns its inner object."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert answer.headers["x-request-id"]
    inner: dict[str, Any] = body["error"]
    return inner


def ready(service: Service) -> bool:
    """Whether /readyz returns 200."""
    with service.client("") as client:
        return client.get("/readyz").status_code == 200


def lines_of(answer: httpx.Response) -> Iterator[str]:
    """Data lines of a stream as they arrive."""
    return (line for line in answer.iter_lines() if line.startswith("data: "))


def ask(
    service: Service, key: str | None = None, control: str | None = None, **change: Any
) -> tuple[str, str]:
    """`x-llm-cache` and the text of an answer."""
    answer = whole(service, key, control, **change)
    return answer.headers["x-llm-cache"], answer.json()["choices"][0]["message"]["content"]


def whole(
    service: Service, key: str | None = None, control: str | None = None, **change: Any
) -> httpx.Response:
    """An answer that is not streamed."""
    headers = {"cache-control": control} if control else {}
    with service.client(key) as client:
        answer = client.post(CHAT, json={**GREEDY, **change}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer
