"""The exact cache, against Debian's Redis behind a UNIX socket and an ACL user."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from redis_server import PASSWORD, RedisServer
from service import Service, eventually, running

CHAT = "/v1/chat/completions"
QUESTION = {"model": "echo", "temperature": 0, "messages": [{"role": "user", "content": "one two"}]}


@pytest.fixture(scope="module")
def cached(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a cache; its deadline is longer than in production since the tests' machine is busy."""
    redis: dict[str, Any] = {
        "url": f"unix://{redis_server.socket}",
        "user": "gateway",
        "password_credential": "redis.gateway",
        "deadline_ms": 300,
    }
    folder = tmp_path_factory.mktemp("cached")
    with running(folder, redis=redis, credentials={"redis.gateway": PASSWORD}) as service:
        yield service


def ask(service: Service, key: str | None = None, **change: Any) -> tuple[str, str]:
    """`x-llm-cache` and the text."""
    with service.client(key) as client:
        answer = client.post(CHAT, json={**QUESTION, **change})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-llm-cache"], answer.json()["choices"][0]["message"]["content"]


def test_the_same_greedy_question_is_answered_from_the_cache(cached: Service) -> None:
    assert ask(cached) == ("miss", "one two")
    assert ask(cached) == ("hit", "one two")
    assert cached.metrics()['llm_cache_total{result="hit"}'] >= 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 1},
        {"messages": [{"role": "user", "content": "one  two"}]},
        {"messages": [{"role": "system", "content": "one two"}]},
        {"stop": "zzz"},
        {"seed": 1},
    ],
)
def test_whatever_the_answer_depends_on_is_in_the_key(cached: Service, change: dict[str, Any]) -> None:
    ask(cached)
    assert ask(cached, **change)[0] == "miss"


def test_sampled_answers_and_streams_pass_the_cache_by(cached: Service) -> None:
    assert ask(cached, temperature=0.5)[0] == "bypass"
    assert ask(cached, temperature=None)[0] == "bypass"
    with cached.client() as client, client.stream("POST", CHAT, json={**QUESTION, "stream": True}) as answer:
        assert "x-llm-cache" not in answer.headers


def test_two_tenants_never_share_an_entry(cached: Service) -> None:
    ask(cached)
    other = cached.add_key("eve", "sales")["key"]
    colleague = cached.add_key("bob", "research")["key"]

    def known() -> bool:
        with cached.client(colleague) as client:
            return client.get("/v1/models").status_code == 200

    eventually("the new keys are known", known)
    assert ask(cached, colleague)[0] == "hit"
    assert ask(cached, other)[0] == "miss"


def test_redis_slow_or_gone_is_a_miss_and_never_an_error(cached: Service, redis_server: RedisServer) -> None:
    ask(cached)
    redis_server.process.send_signal(signal.SIGSTOP)
    before = time.monotonic()
    assert ask(cached) == ("miss", "one two")
    assert time.monotonic() - before < 2
    redis_server.process.send_signal(signal.SIGCONT)
    redis_server.stop()
    for _ in range(3):
        assert ask(cached) == ("miss", "one two")
    assert cached.metrics()['llm_cache_total{result="error"}'] >= 2
    redis_server.start()
    eventually("it is used again", lambda: ask(cached)[0] == "hit")


def test_a_gateway_without_redis_says_so_and_goes_on(echo: Service) -> None:
    assert "no Redis is configured" in echo.logs()
    with echo.client() as client:
        answer: httpx.Response = client.post(CHAT, json=QUESTION)
    assert (answer.status_code, answer.headers["x-llm-cache"]) == (200, "bypass")
