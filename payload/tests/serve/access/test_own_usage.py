"""`GET /v1/usage`: a subject sees its own quotas, as all gateways count them."""

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from questions import error
from redis_server import PASSWORD, RedisServer
from service import Service, eventually, running

from llmserve.access.quotas import LEASES
from llmserve.gateway.fastapi_routes import OwnUsage

QUOTAS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day")


@pytest.fixture(scope="module")
def counted(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose quotas are in Redis."""
    folder = tmp_path_factory.mktemp("counted")
    settings = {**redis_server.settings, "deadline_ms": 5000}
    with running(folder, redis=settings, credentials={"redis.gateway": PASSWORD}) as service:
        yield service


def usage(service: Service, key: str | None = None) -> dict[str, Any]:
    """What the gateway says, once it knows the key."""
    with service.client(key) as client:

        def answered() -> httpx.Response | None:
            answer = client.get("/v1/usage")
            return answer if answer.status_code == 200 else None

        answer = eventually("an answer", answered)
    OwnUsage.model_validate_json(answer.content)
    own: dict[str, Any] = answer.json()
    return own


def test_what_an_answer_used_is_no_longer_remaining(counted: Service) -> None:
    started = time.time()
    while True:
        before = usage(counted)
        with counted.client() as client:
            answered = client.post("/generate", json={"prompt": "one two three"}).json()
        after = usage(counted)
        if all(before[name]["resets_at"] == after[name]["resets_at"] for name in QUOTAS):
            break  # else a minute, or the day, has ended between the two
    tokens = answered["usage"]["total_tokens"]
    spent = {name: after[name]["used"] - before[name]["used"] for name in QUOTAS}
    assert spent == {"requests_per_minute": 2, "tokens_per_minute": tokens, "tokens_per_day": tokens}
    for name, seconds in zip(QUOTAS, (60, 60, 86400), strict=True):
        assert after[name]["used"] + after[name]["remaining"] == after[name]["limit"] > 0
        ends = datetime.fromisoformat(after[name]["resets_at"]).timestamp()
        assert ends % seconds == 0
        assert started < ends <= time.time() + seconds


def test_another_subject_sees_only_its_own(counted: Service) -> None:
    with counted.client() as client:
        client.post("/generate", json={"prompt": "one two three"})
    other = usage(counted, counted.add_key("eve", "research")["key"])
    assert other["requests_per_minute"]["used"] == 1, "its own request, and none of ada's"
    assert other["tokens_per_day"]["used"] == 0


def test_leases_of_another_gateway_count_as_used(
    counted: Service, redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = {**redis_server.settings, "deadline_ms": 5000}
    with running(tmp_path, redis=settings, credentials={"redis.gateway": PASSWORD}) as service:
        before = usage(service)["tokens_per_day"]
        theirs, ours = (each.add_key("mia", "research")["key"] for each in (counted, service))
        usage(counted, theirs)
        with counted.client(theirs) as client:
            client.post("/generate", json={"prompt": "one two three"})
        seen = usage(service, ours)["tokens_per_day"]
    assert seen["used"] == before["limit"] // LEASES
    assert seen["remaining"] == before["limit"] - seen["used"]


def test_without_redis_nothing_is_said_of_quotas(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        refused = client.get("/v1/usage")
        assert "Redis" in error(refused, 503, "usage_unavailable")["message"]
        assert refused.headers["retry-after"] == "5"
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200, "answers go on"
