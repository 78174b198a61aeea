"""Responses to invalid requests: status, code, and a message with the value seen."""

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from questions import CHAT, error
from routes import every_route
from service import Service

QUESTION: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "x"}]}


def test_malformed_json_is_refused_with_the_position_of_the_error(client: httpx.Client) -> None:
    assert "line 1 column" in error(client.post(CHAT, content=b'{"model": '), 400, "invalid_json")["message"]
    error(client.post(CHAT, content=b""), 400, "invalid_json")
    error(client.post(CHAT, content=b"\xff\xfe"), 400, "invalid_json")
    error(client.post(CHAT, content=b"[" * 100_000), 400, "invalid_json")
    error(client.post(CHAT, content=b"[]"), 400, "invalid_type")


@pytest.mark.parametrize(
    ("change", "param", "seen"),
    [
        ({"max_tokens": "5"}, "max_tokens", '"5"'),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": True}, "max_tokens", "true"),
        ({"max_tokens": 100_000}, "max_tokens", "100000"),
        ({"temperature": 2.5}, "temperature", "2.5"),
        ({"temperature": "warm"}, "temperature", "warm"),
        ({"top_p": 0}, "top_p", "0"),
        ({"stream": "yes"}, "stream", "yes"),
        ({"stop": ["a", 5]}, "stop.1", "5"),
        ({"messages": "hello"}, "messages", "hello"),
        ({"messages": []}, "messages", "[]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "robot"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "image",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ],
)
def test_a_wrong_value_is_named_and_shown(
    client: httpx.Client, change: dict[str, Any], param: str, seen: str
) -> None:
    refused = error(client.post(CHAT, json={**QUESTION, **change}), 400, "invalid_value")
    assert refused["param"] == param
    assert seen in refused["message"]


def test_a_number_is_an_integer_as_json_schema_has_it(client: httpx.Client) -> None:
    assert client.post(CHAT, json={**QUESTION, "max_tokens": 5.0, "seed": 1.0}).status_code == 200
    error(client.post(CHAT, json={**QUESTION, "max_tokens": 5.5}), 400, "invalid_value")


def test_a_missing_field_is_named(client: httpx.Client) -> None:
    assert error(client.post(CHAT, json={"model": "echo"}), 400, "missing_field")["param"] == "messages"
    assert error(client.get("/generate"), 400, "missing_field")["param"] == "prompt"


def test_unsupported_fields_are_all_named_and_never_ignored(client: httpx.Client) -> None:
    engines: dict[str, Any] = {"tools": [{"type": "function"}], "logit_bias": {"5": 1}, "n": 2}
    for more in (engines, {"made_up": 1, "cache_salt": "x"}):
        message = error(client.post(CHAT, json={**QUESTION, **more}), 400, "unsupported_field")["message"]
        assert all(name in message for name in more)
    error(client.post("/generate", json={"prompt": "x", "top_p": 0.5}), 400, "unsupported_field")
    error(client.get("/generate", params={"prompt": "x", "seed": 1}), 400, "unsupported_field")


def test_an_unsupported_field_may_have_its_neutral_value(client: httpx.Client) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": False, "tools": None}
    assert client.post(CHAT, json={**QUESTION, **neutral}).status_code == 200
    error(client.post(CHAT, json={**QUESTION, "n": True}), 400, "invalid_value")


def test_a_query_is_checked_as_strictly_as_a_body(client: httpx.Client) -> None:
    error(client.get("/generate?prompt=x&max_tokens=many"), 400, "invalid_value")
    error(client.get("/generate?prompt=x&prompt=y"), 400, "invalid_value")
    error(client.get("/generate?prompt=%ff"), 400, "invalid_query")
    error(client.get("/generate?prompt="), 400, "invalid_value")


def test_a_body_over_the_limit_is_413_with_or_without_its_length(client: httpx.Client) -> None:
    big = json.dumps({"prompt": "x" * 1_100_000}).encode()
    assert "1048576" in error(client.post("/generate", content=big), 413, "body_too_large")["message"]
    chunks = (big[at : at + 65536] for at in range(0, len(big), 65536))
    error(client.post("/generate", content=chunks), 413, "body_too_large")
    assert client.get("/generate?prompt=still+there").status_code == 200


def test_the_refusal_of_a_long_prompt_states_both_lengths(client: httpx.Client) -> None:
    long = "word " * 5000
    for body in {**QUESTION, "messages": [{"role": "user", "content": long}]}, {**QUESTION, "stream": True}:
        body["messages"] = [{"role": "user", "content": long}]
        message = error(client.post(CHAT, json=body), 400, "context_length_exceeded")["message"]
        assert "5000" in message
        assert "4096" in message
    nearly = [{"role": "user", "content": "word " * 4000}]
    error(
        client.post(CHAT, json={**QUESTION, "messages": nearly, "max_tokens": 500}),
        400,
        "context_length_exceeded",
    )
    assert client.post(CHAT, json={**QUESTION, "messages": nearly}).json()["usage"]["completion_tokens"] == 96


def test_an_unknown_model_is_404_and_the_message_lists_the_models(client: httpx.Client) -> None:
    refused = error(client.post(CHAT, json={**QUESTION, "model": "gpt-4"}), 404, "model_not_found")
    assert "gpt-4" in refused["message"]
    assert "'echo'" in refused["message"]
    error(client.get("/v1/models/gpt-4"), 404, "model_not_found")


def test_a_wrong_method_is_405_and_an_unknown_path_404(client: httpx.Client) -> None:
    answer = client.delete("/generate")
    error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, POST"
    error(client.get("/v1/nothing"), 404, "unknown_path")
    error(client.get("/v1/models/"), 404, "unknown_path")
    error(client.get("/v1/models/a%0Ab"), 404, "unknown_path")


def test_every_route_but_those_of_health_needs_a_key(echo: Service, tmp_path: Path) -> None:
    table = every_route(tmp_path)
    assert len(table) >= 8
    with echo.client("") as anonymous:
        for route in table:
            for method in route.methods:
                answer = anonymous.request(method, route.path)
                if route.path in {"/livez", "/readyz", "/health", "/drainz"}:
                    assert answer.status_code == 200
                else:
                    error(answer, 401, "missing_key")
                    assert answer.headers["www-authenticate"].startswith("Bearer")
        error(anonymous.get("/nothing"), 401, "missing_key")
