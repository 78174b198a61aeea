"""A model of 131,072 tokens of context behind a gateway without tuning: its longest prompts pass, by the shipped rates."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from authority import ROOT
from questions import CHAT, error
from redis_server import PASSWORD, RedisServer
from scripted_opa import ScriptedOpa
from scripted_opa import answer as decision
from scripted_upstream import ScriptedUpstream, answer
from service import Service, running

from llmserve.access.decision import Decision, Rate
from llmserve.access.quotas import Quotas
from llmserve.api.errors import ApiError
from llmserve.asgi import Message, Receive, Scope, Send
from llmserve.gateway import middleware
from llmserve.gateway.middleware import BodyLimit
from llmserve.http_client import BadAnswer, HttpClient
from llmserve.metrics import Metrics
from llmserve.settings import (
    BODY_BYTES_A_TOKEN,
    LEAST_BODY_BYTES,
    MOST_BODY_BYTES,
    MOST_CONTEXT,
    Limits,
    Remote,
)
from llmserve.upstream.admission import Queue
from llmserve.upstream.openai_client import OpenAiClient

CONTEXT = 131072
QUOTAS = (("requests", "minute"), ("tokens", "minute"), ("tokens", "day"))
RATES = yaml.safe_load((ROOT / "policy/llm/rates/data.yaml").read_text())
USED = {"prompt_tokens": 120_000, "completion_tokens": 50}
ANSWER = answer({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": USED})
PROMPTS = {
    # About 4.5 bytes a token.
    "English": "the patient was seen again in the ward after three days " * (540_000 // 56),
    # 1.5 characters a token, which clients that write ASCII send as six bytes each.
    "Chinese, escaped": "患者三天后在病房再次接受检查" * (180_000 // 14),
}


def described(context: object) -> Any:
    """A server's list of models with this context."""
    return answer({"data": [{"id": "m", "max_model_len": context}]})


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(tmp_path_factory.mktemp("upstream") / "api.sock")
    server.models, server.script = described(CONTEXT), ANSWER
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(
    upstream: ScriptedUpstream, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A gateway with all defaults, and a class of the shipped policy."""
    folder = tmp_path_factory.mktemp("long")
    opa = ScriptedOpa(folder / "opa.sock")
    opa.server.reply = decision(rate=shipped("standard"), max_tokens=4096)
    with running(
        folder,
        {},
        remotes={"m": {"socket": str(upstream.listener.getsockname()), "revision": "1"}},
        policy={"engine": "server", "socket": str(opa.socket)},
        redis={**redis_server.settings, "deadline_ms": 5000},
        credentials={"redis.gateway": PASSWORD},
    ) as service:
        yield service
    opa.stop()


def shipped(name: str) -> dict[str, int]:
    """A class of the shipped policy, as decisions have it."""
    return {key: value for key, value in RATES[name].items() if key != "rank"}


def post(service: Service, key: str, prompt: str, **more: object) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}
    with service.client(key) as client:
        return client.post(CHAT, content=json.dumps(body))  # escapes all that is not ASCII


@pytest.mark.parametrize("language", PROMPTS)
def test_a_prompt_of_120_thousand_tokens_passes_all_defaults(service: Service, language: str) -> None:
    key = service.add_key(language[:7], "research")["key"]
    assert post(service, key, PROMPTS[language]).status_code == 200


def test_a_body_passes_up_to_what_the_context_needs_and_not_a_byte_more(service: Service) -> None:
    key, limit = service.add_key("long", "research")["key"], CONTEXT * BODY_BYTES_A_TOKEN
    overhead = len(json.dumps({"model": "m", "messages": [{"role": "user", "content": ""}]}))
    assert post(service, key, "a" * (limit - overhead)).status_code == 200
    refused = error(post(service, key, "a" * (limit - overhead + 1)), 413, "body_too_large")
    assert refused["message"] == f"the body has at least {limit + 1} bytes, the limit is {limit}: send less"


@pytest.mark.parametrize("name", RATES)
def test_a_minute_of_each_shipped_class_holds_a_full_context_also_without_redis(name: str) -> None:
    async def scenario() -> None:
        rate = Rate(name, *(RATES[name][f"{kind}_per_{period}"] for kind, period in QUOTAS))
        decision = Decision(True, "r", "rule", 1, None, 8192, rate)
        await Quotas(None, Metrics()).reserve("t", "s", decision, CONTEXT, 8192)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "does not report the model's context"),
        (0, "does not report the model's context"),
        ("131072", "does not report the model's context"),
        (True, "a context of True tokens, and 1 to 16777216 are possible"),
        (-1, "a context of -1 tokens"),
        (10**9, "a context of 1000000000 tokens"),
    ],
)
def test_a_server_that_reports_no_possible_context_is_not_used(
    tmp_path: Path, context: object, message: str
) -> None:
    settings = Remote(socket=(tmp_path / "api.sock",), revision="1")
    client = OpenAiClient(
        "m", HttpClient(tmp_path / "api.sock", None, None), settings, Queue(1, None), b"salt"
    )
    listed = {"data": [{"id": "m", "max_model_len": context}]}
    with pytest.raises(BadAnswer, match=message):
        client.described(json.dumps(listed).encode())
    listed["data"][0]["max_model_len"] = MOST_CONTEXT
    assert client.described(json.dumps(listed).encode()).context == MOST_CONTEXT


@pytest.mark.parametrize(
    ("contexts", "configured", "most"),
    [
        ([2048], None, LEAST_BODY_BYTES),
        ([2048, 100_000], None, 100_000 * BODY_BYTES_A_TOKEN),
        ([MOST_CONTEXT], None, MOST_BODY_BYTES),
        ([2048, 0], None, MOST_BODY_BYTES),
        ([MOST_CONTEXT], 5000, 5000),
    ],
    ids=["small", "the largest counts", "huge", "not yet reported", "configured"],
)
def test_the_largest_body_follows_the_largest_context(
    contexts: list[int], configured: int | None, most: int
) -> None:
    assert Limits(body_bytes=configured).largest_body(contexts) == most


@pytest.mark.parametrize("value", [0, -1, MOST_BODY_BYTES + 1])
def test_a_configured_body_size_beyond_what_the_event_loop_can_validate_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="body_bytes"):
        Limits(body_bytes=value)


def test_bodies_in_progress_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODIES_BYTES", 250)

    async def scenario() -> None:
        ends = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await ends.wait()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"x" * 100}

        async def send(message: Message) -> None:
            """Nothing is sent."""

        limited = BodyLimit(app, lambda: 100, "/streamed/", 1000)
        scope: Scope = {"path": "/", "headers": []}
        running = [asyncio.create_task(limited(scope, receive, send)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await limited(scope, receive, send)
        assert (refused.value.status, refused.value.code) == (503, "overloaded")
        assert "have 300 bytes, the limit is 250" in refused.value.message
        ends.set()
        await asyncio.gather(*running)
        assert limited.total == 0, "one that was refused holds nothing either"
        await limited(scope, receive, send)

    asyncio.run(scenario())
