"""Token quotas of a gateway: no way to end an answer early makes its tokens free, and the record states them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from questions import CHAT
from redis_server import PASSWORD, RedisServer
from scripted_opa import ALLOWED, ScriptedOpa, answer
from service import Service, eventually, running

LIMIT = 3000  # tokens a day; a limit for a minute would begin anew during the test
WORDS = 200
MODELS = {"echo": {"driver": "echo", "token_seconds": 0.002}}


@pytest.fixture
def service(redis_server: RedisServer, tmp_path: Path) -> Iterator[Service]:
    """A gateway with an empty cache, a slow engine and a limit."""
    with redis_server.client() as operator:
        operator.flushdb()
    opa = ScriptedOpa(tmp_path / "opa.sock")
    rate = {**ALLOWED["rate"], "tokens_per_minute": 10**6, "tokens_per_day": LIMIT}
    opa.server.reply = answer(rate=rate, max_tokens=LIMIT)
    with running(
        tmp_path,
        MODELS,
        policy={"engine": "server", "socket": str(opa.socket)},
        redis={**redis_server.settings, "deadline_ms": 5000},
        credentials={"redis.gateway": PASSWORD},
    ) as service:
        yield service
    opa.stop()


def body(number: int, **change: Any) -> dict[str, Any]:
    """A request whose answer has WORDS tokens, its prompt a few more."""
    words = f"request{number} " + "word " * (WORDS - 1)
    messages = [{"role": "user", "content": words}]
    return {"model": "echo", "temperature": 0, "max_tokens": WORDS, "messages": messages, **change}


def read(client: httpx.Client, request: dict[str, Any], pieces: int) -> int:
    """Start a stream, read so many pieces, and hang up; returns the status."""
    with client.stream("POST", CHAT, json=request) as streamed:
        if streamed.status_code == 200:
            lines = streamed.iter_lines()
            for _ in range(2 * pieces):
                next(lines)
        return streamed.status_code


def until_refused(attempt: Callable[[int], int]) -> int:
    """How many attempts succeed before the first 429."""
    for number in range(100):
        status = attempt(number)
        if status == 429:
            return number
        assert status in {200, 499}
    return 100


def idle(service: Service) -> None:
    """Wait until the engine works on nothing."""
    eventually("idle", lambda: service.metrics()['llm_requests_running{model="echo"}'] == 0)


def test_a_client_pays_for_an_answer_whose_first_client_has_left(service: Service) -> None:
    """Each pair costs one prompt and one answer, regardless of the client that reads it."""

    def attempt(number: int) -> int:
        with service.client() as client, ExitStack() as first:
            begun = first.enter_context(client.stream("POST", CHAT, json=body(number, stream=True)))
            if begun.status_code != 200:
                return begun.status_code
            next(begun.iter_lines())
            with client.stream("POST", CHAT, json=body(number, stream=True)) as joined:
                if joined.status_code == 200:
                    first.close()
                    assert "data: [DONE]" in list(joined.iter_lines())
                return joined.status_code

    assert until_refused(attempt) <= LIMIT // (2 * WORDS)


def test_a_stream_that_the_client_cuts_pays_its_prompt_and_what_was_generated(service: Service) -> None:
    with service.client() as client:
        cut = until_refused(
            lambda number: read(client, body(number, stream=True), 5)
        )  # the first has a role and no text
    assert 2 <= cut <= LIMIT // WORDS
    idle(service)
    outcomes = [each for each in service.records() if each.get("http.response.status_code") == 200]
    assert len(outcomes) == cut
    assert all(each["gen_ai.usage.input_tokens"] >= WORDS for each in outcomes)
    assert all(each["gen_ai.usage.output_tokens"] >= 4 for each in outcomes)


def test_an_answer_without_a_length_reserves_little_and_pays_what_it_uses(service: Service) -> None:
    """The limit of its length, which is that of the policy, would alone exceed what is left after the first one."""
    with service.client() as client:
        served = until_refused(
            lambda number: client.post(CHAT, json=body(number, max_tokens=None)).status_code
        )
    assert LIMIT // (2 * WORDS) - 1 <= served <= LIMIT // (2 * WORDS)


@pytest.mark.parametrize(("length", "most"), [(WORDS, LIMIT // (2 * WORDS) + 1), (None, 1)])
def test_an_answer_that_the_client_does_not_wait_for_pays_for_the_longest_that_it_allows(
    service: Service, length: int | None, most: int
) -> None:
    def attempt(number: int) -> int:
        with service.client() as client:
            try:
                request = body(number, max_tokens=length)
                return client.post(
                    CHAT, json=request, headers={"cache-control": "no-store"}, timeout=0.2
                ).status_code
            except httpx.ReadTimeout:
                idle(service)  # so that it is settled
                return 499

    assert until_refused(attempt) <= most


def test_a_deadline_that_ends_an_answer_does_not_make_it_free(service: Service) -> None:
    with service.client() as client:

        def attempt(number: int) -> int:
            headers = {"x-llm-deadline-ms": "300"}
            status = client.post(CHAT, json=body(number, stream=True), headers=headers).status_code
            return 200 if status == 504 else status

        assert until_refused(attempt) <= LIMIT // WORDS


def test_a_request_that_no_engine_has_begun_costs_nothing(service: Service) -> None:
    service.engines["echo"].kill()
    eventually("noticed", lambda: service.metrics()['llm_engine_up{model="echo"}'] == 0)
    with service.client() as client:
        for number in range(LIMIT // WORDS):
            assert client.post(CHAT, json=body(number)).status_code == 503
        service.start_engine("echo")
        eventually("served", lambda: client.post(CHAT, json=body(99)).status_code == 200)
