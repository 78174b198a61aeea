"""The exact cache, with Debian's Redis behind a UNIX socket and an ACL user."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import redis
from questions import CHAT, GREEDY, ask, error, whole
from redis_server import PASSWORD, RedisServer
from service import Service, events, eventually, running

from llmserve.cache.exact import TAG_BYTES, CacheWish, ExactCache, Kept, cache_wish
from llmserve.metrics import Metrics
from llmserve.protocol import Done
from llmserve.redis_client import RedisClient
from llmserve.settings import Redis

SLOW_WORDS = " ".join(f"slow{number}" for number in range(20))
SLOW = {"model": "slow", "temperature": 0, "messages": [{"role": "user", "content": SLOW_WORDS}]}
MODELS: dict[str, dict[str, Any]] = {
    "echo": {"driver": "echo"},
    "slow": {"driver": "echo", "token_seconds": 0.05},
}


@pytest.fixture(scope="module")
def cached(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a cache; its deadline is longer than in production, because the machine that runs tests is busy."""
    settings = {**redis_server.settings, "deadline_ms": 5000}
    folder = tmp_path_factory.mktemp("cached")
    with running(folder, MODELS, redis=settings, credentials={"redis.gateway": PASSWORD}) as service:
        yield service


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """Redis as seen by its operator."""
    with redis_server.client() as client:
        yield client


def streamed(service: Service, **change: Any) -> tuple[str, list[Any]]:
    """`x-llm-cache`, and the choices of each chunk of a stream."""
    body = {**GREEDY, "stream": True, **change}
    with service.client() as client, client.stream("POST", CHAT, json=body) as answer:
        *chunks, end = events(answer)
    assert end == "[DONE]"
    return answer.headers["x-llm-cache"], [chunk["choices"] for chunk in chunks]


def user_message(words: str) -> list[dict[str, str]]:
    """Messages that no other test sends."""
    return [{"role": "user", "content": words}]


def engine_requests(service: Service, model: str = "slow") -> float:
    """Number of requests sent to the engine so far."""
    return service.metrics()[f'llm_queue_seconds_count{{model="{model}"}}']


def served_by_others(service: Service) -> float:
    """Number of answers so far that were served by, or shared with, another request."""
    scrape = service.metrics()
    return sum(scrape[f'llm_cache_total{{result="{result}"}}'] for result in ("shared", "hit"))


def test_a_repeated_greedy_request_is_answered_from_the_cache(cached: Service) -> None:
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


def test_sampled_answers_bypass_the_cache_unless_the_client_sends_a_max_age(cached: Service) -> None:
    for temperature in 0.5, None:
        assert ask(cached, temperature=temperature)[0] == "bypass"
        assert ask(cached, temperature=temperature, control="max-age=60")[0] == "miss"
        answer = whole(cached, temperature=temperature, control="max-age=60")
        assert (answer.headers["x-llm-cache"], int(answer.headers["age"]) < 60) == ("hit", True)
        assert ask(cached, temperature=temperature)[0] == "bypass"


def test_a_stream_is_replayed_in_its_original_pieces(cached: Service) -> None:
    words = user_message("un deux trois quatre")
    first, second = streamed(cached, messages=words), streamed(cached, messages=words)
    assert (first[0], second[0]) == ("miss", "hit")
    assert first[1] == second[1]
    texts = [choices[0]["delta"].get("content") for choices in second[1]]
    assert texts == ["", "un ", "deux ", "trois ", "quatre", None]


def test_streams_and_whole_answers_share_their_entries(cached: Service) -> None:
    words = user_message("eins zwei drei")
    assert ask(cached, messages=words)[0] == "miss"
    cache, choices = streamed(cached, messages=words)
    assert (cache, len(choices)) == ("hit", 5)
    words = user_message("uno due")
    assert streamed(cached, messages=words)[0] == "miss"
    assert ask(cached, messages=words) == ("hit", "uno due")


def test_a_request_can_bypass_the_cache(cached: Service) -> None:
    words = user_message("keep out")
    assert ask(cached, messages=words, control="no-store")[0] == "bypass"
    assert ask(cached, messages=words)[0] == "miss"
    assert ask(cached, messages=words, control="no-store")[0] == "bypass"
    assert ask(cached, messages=words, control="no-cache")[0] == "miss"
    assert ask(cached, messages=words, control="max-age=0")[0] == "miss"
    assert ask(cached, messages=words, control="private")[0] == "hit"


@pytest.mark.parametrize(
    ("header", "wish"),
    [
        (None, CacheWish()),
        (b"", CacheWish()),
        (b"private, x=y, ,=", CacheWish()),
        (b"No-Store", CacheWish(read=False, write=False)),
        (b"max-age=5, no-cache", CacheWish(read=False, max_age=5)),
        (b'max-age="7"', CacheWish(max_age=7)),
        (b"max-age = 8 ", CacheWish(read=False, max_age=0)),
        (b"max-age=0", CacheWish(read=False, max_age=0)),
        (b"max-age", CacheWish(read=False, max_age=0)),
        (b"max-age=-5", CacheWish(read=False, max_age=0)),
        (b"max-age=" + b"9" * 5000, CacheWish(read=False, max_age=0)),
        (b"\xff\xfe, max-age=1", CacheWish(max_age=1)),
    ],
)
def test_cache_control_is_read_as_the_rfc_says(header: bytes | None, wish: CacheWish) -> None:
    assert cache_wish(header) == wish


def test_the_age_of_an_entry_is_never_negative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    assert Kept([], "stop", 1, 1, time.time() - 3600).age() == 3600
    assert Kept([], "stop", 1, 1, time.time() + 3600).age() == 0, "the clock was set back by an hour"


def test_an_entry_that_this_host_did_not_store_is_a_miss_and_replaced(
    cached: Service, store: redis.Redis
) -> None:
    """Neither Redis nor another host that writes to it can forge an answer."""
    words = user_message("believe me")
    before = set(store.keys("llm:local:exact:*"))
    ask(cached, messages=words)
    eventually("it is cached", lambda: set(store.keys("llm:local:exact:*")) - before)
    (name,) = set(store.keys("llm:local:exact:*")) - before
    value = store.get(name)
    assert isinstance(value, bytes)
    assert ask(cached, messages=words) == ("hit", "believe me")
    tag, entry = value[:TAG_BYTES], json.loads(value[TAG_BYTES:])
    forged = json.dumps({**entry, "pieces": ["Send it to https://evil.example"]}).encode()
    written = b""
    for wrong in tag + forged, forged, bytes(TAG_BYTES) + forged, b"", b"{}", tag:
        eventually("the answer is cached again", lambda last=written: store.get(name) != last)
        written = wrong
        store.set(name, written)
        assert ask(cached, messages=words) == ("miss", "believe me")


def test_an_entry_is_used_while_it_is_young_enough_for_the_client_and_by_the_host_that_stored_it(
    redis_server: RedisServer,
) -> None:
    settings = Redis(**redis_server.settings | {"deadline_ms": 5000, "password_credential": None})

    async def scenario() -> None:
        client = RedisClient(settings, PASSWORD)
        cache = ExactCache(client, 60, b"secret", Metrics())
        await cache.put("exact:a", ["x"], Done(0, "", "stop", 1, 1))
        kept = await cache.get("exact:a", 60)
        assert kept
        assert kept.pieces == ["x"]
        assert await cache.get("exact:a", -1) is None
        assert await ExactCache(client, 60, b"another host's", Metrics()).get("exact:a", None) is None
        await client.close()

    asyncio.run(scenario())


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
    with ThreadPoolExecutor() as pool:
        before = engine_requests(cached)
        both = [pool.submit(ask, cached, key, None, **SLOW) for key in (cached.key, other)]
        assert [each.result()[0] for each in both] == ["miss", "miss"], "nor an answer in progress"
        assert engine_requests(cached) == before + 2


def test_identical_concurrent_requests_make_the_engine_work_once(cached: Service) -> None:
    question = {**SLOW, "messages": user_message(SLOW_WORDS + " once")}
    before = engine_requests(cached)
    with ThreadPoolExecutor(12) as pool:
        bodies = [pool.submit(ask, cached, None, None, **question) for _ in range(6)]
        streams = [pool.submit(streamed, cached, **question) for _ in range(6)]
        answers = [each.result() for each in bodies]
        chunks = [each.result() for each in streams]
    assert {text for _, text in answers} == {SLOW_WORDS + " once"}
    assert all(pieces == chunks[0][1] for _, pieces in chunks)
    assert len(chunks[0][1]) == 23, "the role, 21 words and the end"
    assert sorted(cache for cache, _ in [*answers, *chunks]) == ["hit"] * 11 + ["miss"]
    assert engine_requests(cached) == before + 1


def test_the_first_client_may_disconnect_or_stall_without_affecting_the_others(cached: Service) -> None:
    question = {**SLOW, "messages": user_message(SLOW_WORDS + " leave"), "stream": True}
    body = json.dumps(question).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: llm\r\nauthorization: Bearer {cached.key}\r\n"
    before = engine_requests(cached)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(cached.folder / "http.sock"))
        first.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        eventually("the engine works", lambda: engine_requests(cached) == before + 1)
        served = served_by_others(cached)
        second = pool.submit(ask, cached, None, None, **{**question, "stream": False})
        eventually(
            "the second one waits for the answer, or has it", lambda: served_by_others(cached) == served + 1
        )
        first.close()
        assert second.result() == ("hit", SLOW_WORDS + " leave")
    assert engine_requests(cached) == before + 1


def test_if_the_first_request_fails_the_next_one_runs(cached: Service) -> None:
    question = {**SLOW, "messages": user_message(SLOW_WORDS + " fail")}
    before = engine_requests(cached)
    with ThreadPoolExecutor() as pool, cached.client() as client:
        deadline = {"x-llm-deadline-ms": "400"}
        first = pool.submit(client.post, CHAT, json=question, headers=deadline)
        eventually("the engine works", lambda: engine_requests(cached) == before + 1)
        others = [pool.submit(ask, cached, None, None, **question) for _ in range(3)]
        error(first.result(), 503, "deadline_exceeded")
        answers = [each.result() for each in others]
    assert {text for _, text in answers} == {SLOW_WORDS + " fail"}
    assert engine_requests(cached) == before + 2, "one of the three ran for all of them"


def test_an_answer_without_listeners_is_cancelled(cached: Service) -> None:
    question = {**SLOW, "messages": user_message(SLOW_WORDS * 10)}
    for _ in range(2):
        with cached.client() as client, pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=question, timeout=0.3)
    runs = 'llm_requests_running{model="slow"}'
    eventually("the slot is free", lambda: cached.metrics()[runs] == 0, 8)  # of the 10 s that it takes


def test_a_redis_that_hangs_or_is_down_is_a_miss_and_never_an_error(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = {**redis_server.settings, "deadline_ms": 300}
    with running(tmp_path, redis=settings, credentials={"redis.gateway": PASSWORD}) as service:
        eventually("it is cached", lambda: "age" in whole(service).headers)
        redis_server.process.send_signal(signal.SIGSTOP)
        before = time.monotonic()
        assert ask(service) == ("miss", "one two")
        assert time.monotonic() - before < 20, "it would hang for as long as Redis does"
        redis_server.process.send_signal(signal.SIGCONT)
        redis_server.stop()
        for _ in range(3):
            assert ask(service) == ("miss", "one two")
        assert service.metrics()['llm_cache_total{result="error"}'] >= 2
        redis_server.start()
        eventually("it is used again", lambda: ask(service)[0] == "hit", 5)


@pytest.mark.parametrize(
    "option", [["--maxmemory", "1"], ["--replicaof", "127.0.0.1", "1"]], ids=["full", "read-only"]
)
def test_a_redis_that_rejects_writes_counts_errors_and_causes_no_pause(
    tmp_path_factory: pytest.TempPathFactory, option: list[str]
) -> None:
    server = RedisServer(tmp_path_factory.mktemp("redis"), option)
    folder = tmp_path_factory.mktemp("refused")
    settings = {**server.settings, "deadline_ms": 5000}
    try:
        with running(folder, redis=settings, credentials={"redis.gateway": PASSWORD}) as service:
            assert [ask(service) for _ in range(3)] == [("miss", "one two")] * 3
            errors = 'llm_cache_total{result="error"}'
            eventually("the last write was rejected, too", lambda: service.metrics()[errors] >= 3)
            assert service.metrics()[errors] == 3, "one write each, and no pause"
            assert service.logs().count("Redis failed: continuing without it") == 1
    finally:
        server.stop()


def test_a_slow_redis_does_not_cost_each_request_a_deadline(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("late")
    begun, made = time.monotonic(), list[float]()
    with redis_server.delayed(folder / "late.sock", 60, made) as path:
        settings = {**redis_server.settings, "url": f"unix://{path}", "deadline_ms": 50}
        secret = {"redis.gateway": PASSWORD}
        with running(folder, redis=settings, credentials=secret) as service, service.client() as client:
            for number in range(
                40
            ):  # each its own, since an answer can be joined while Redis is asked to keep it
                answer = client.post(CHAT, json={**GREEDY, "messages": user_message(f"one {number}")})
                assert (answer.status_code, answer.headers["x-llm-cache"]) == (200, "miss")
    # A missed deadline closes the connection; after four of them, the next attempt is two seconds later.
    assert 1 <= len(made) <= 5 + (time.monotonic() - begun) / 2, (
        "each of the others would have waited 50 ms for Redis"
    )


def test_a_gateway_without_redis_logs_it_and_serves(echo: Service) -> None:
    assert "no Redis is configured" in echo.logs()
    with echo.client() as client:
        answer: httpx.Response = client.post(CHAT, json=GREEDY)
    assert (answer.status_code, answer.headers["x-llm-cache"]) == (200, "bypass")
