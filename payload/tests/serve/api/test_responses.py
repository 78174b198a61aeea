"""Responses to valid requests."""

import json
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from service import Service, events, eventually, running

from llmserve.api.response_models import ChatCompletion, DrainState, Generated, Health, TextCompletion
from llmserve.api.responses_api_shapes import ResponseObject
from llmserve.gateway.middleware import trace

QUESTION = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}


def test_generate_answers_a_get_with_response_model_and_usage(client: httpx.Client) -> None:
    answer = client.get("/generate", params={"prompt": "one two three", "max_tokens": 2})
    assert answer.status_code == 200
    assert answer.json() == {
        "response": "one two ",
        "id": answer.headers["x-llm-response-id"],
        "model": "echo",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_generate_answers_a_post_in_the_same_way(client: httpx.Client) -> None:
    body = {"prompt": "Über 東京", "max_tokens": 5, "temperature": 0.7, "stream": False}
    assert client.post("/generate", json=body).json()["response"] == "Über 東京"


def test_generate_streams_pieces_then_usage_then_done(client: httpx.Client) -> None:
    with client.stream("POST", "/generate", json={"prompt": "one two", "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *pieces, last, end = events(answer)
    assert [piece["response"] for piece in pieces] == ["one ", "two"]
    assert (last["model"], last["usage"]["total_tokens"], end) == ("echo", 4, "[DONE]")


def test_a_chat_answer_has_the_shape_of_openai(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=QUESTION).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "one two three"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_max_tokens_ends_an_answer_with_length(client: httpx.Client) -> None:
    choice = client.post("/v1/chat/completions", json={**QUESTION, "max_tokens": 1}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(client: httpx.Client, stream: bool) -> None:
    body = {**QUESTION, "stop": ["o th", "zzz"], "stream": stream}
    if not stream:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one tw", "stop")
        return
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        chunks = events(answer)[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one tw"


def test_a_stream_carries_usage_only_on_request(client: httpx.Client) -> None:
    of_vllm = {"include_usage": True, "continuous_usage_stats": True}
    for options, carried in (
        ({"include_usage": True}, True),
        ({"include_usage": False}, False),
        (None, False),
        (of_vllm, True),
    ):
        body = {**QUESTION, "stream": True, "stream_options": options}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            *chunks, last, end = events(answer)
        assert end == "[DONE]"
        assert ("usage" in last) == carried
        if carried:
            assert (last["choices"], last["usage"]["total_tokens"]) == ([], 6)
            assert all(chunk["usage"] is None for chunk in chunks)


def test_the_official_openai_client_gets_chat_stream_completion_and_models(echo: Service) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        api_key=echo.key, base_url="http://llm/v1", http_client=echo.client(), max_retries=0
    ) as client:
        chat = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "hello you"}]
        )
        assert chat.choices[0].message.content == "hello you"
        stream = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "hello you"}], stream=True
        )
        assert [chunk.choices[0].delta.content for chunk in stream] == ["", "hello ", "you", None]
        assert client.completions.create(model="echo", prompt="a b").choices[0].text == "a b"
        pieces = client.completions.create(model="echo", prompt="a b", stream=True)
        assert [piece.choices[0].text for piece in pieces] == ["a ", "b", ""]
        assert [model.id for model in client.models.list()] == ["echo"]
        assert client.models.retrieve("echo").id == "echo"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])


def test_an_answer_names_its_request_and_its_model(client: httpx.Client) -> None:
    answer = client.get("/generate", params={"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert (answer.headers["x-request-id"], answer.headers["x-llm-model"]) == ("mine-1", "echo")
    forged = client.get("/generate", params={"prompt": "a"}, headers={"x-request-id": "x" * 65})
    assert len(forged.headers["x-request-id"]) == 32


def test_the_openapi_document_describes_every_route_and_loads_nothing_from_elsewhere(
    client: httpx.Client,
) -> None:
    document = client.get("/openapi.json").json()
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {
        ("/generate", "get"),
        ("/generate", "post"),
        ("/v1/chat/completions", "post"),
        ("/v1/completions", "post"),
        ("/v1/responses", "post"),
        ("/v1/models", "get"),
        ("/v1/usage", "get"),
        ("/livez", "get"),
        ("/readyz", "get"),
        ("/health", "get"),
        ("/drainz", "get"),
    } <= described
    text = client.get("/openapi.json").text
    assert all(f'"{name}"' in text for name in ("ChatBody", "CompletionBody", "GenerateBody", "Message"))
    assert "http://" not in text
    assert "https://" not in text
    for page in "/docs", "/redoc", "/docs/oauth2-redirect":
        assert client.get(page).status_code == 404


def test_answers_have_the_shapes_that_the_openapi_document_gives_them(client: httpx.Client) -> None:
    for path, shape, body in (
        ("/v1/chat/completions", ChatCompletion, QUESTION),
        ("/v1/completions", TextCompletion, {"model": "echo", "prompt": "a b"}),
        ("/v1/responses", ResponseObject, {"model": "echo", "input": "a b"}),
        ("/generate", Generated, {"prompt": "a b"}),
    ):
        shape.model_validate_json(client.post(path, json=body).content)
    assert Health.model_validate_json(client.get("/livez").content).status == "alive"
    for path in "/readyz", "/health":
        assert Health.model_validate_json(client.get(path).content).status == "ready"
    assert DrainState.model_validate_json(client.get("/drainz").content).in_flight >= 0


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_an_answer_continues_the_trace_of_its_request(echo: Service, client: httpx.Client) -> None:
    given = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = client.get("/generate", params={"prompt": "a"}, headers=given)
    version, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span not in {PARENT, "0" * 16}
    (line,) = eventually("it is logged", lambda: [each for each in echo.logs().splitlines() if TRACE in each])
    assert json.loads(line)["transaction.id"] == span
    assert client.get("/nothing", headers=given).headers["traceparent"].split("-")[1] == TRACE
    fresh = client.get("/generate", params={"prompt": "a"}).headers
    assert fresh["traceparent"].split("-")[1] == fresh["x-request-id"]


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (f"00-{TRACE}-{PARENT}-00", (TRACE, False)),
        (f"00-{TRACE}-{PARENT}-03", (TRACE, True)),
        (f"cc-{TRACE}-{PARENT}-01-what comes later", (TRACE, True)),
        (f"00-{TRACE}-{PARENT}-01-what comes later", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}-1", None),
        (f"00-{TRACE}-{PARENT}", None),
        ("", None),
        ("00-\xff", None),
    ],
)
def test_an_invalid_traceparent_starts_a_new_trace(given: str, known: tuple[str, bool] | None) -> None:
    expected = known and (known[0].encode(), known[1])
    assert trace(given.encode("latin-1")) == expected


def test_an_answer_reports_the_overhead_of_the_gateway(tmp_path: Path) -> None:
    with running(tmp_path, {"echo": {"driver": "echo", "token_seconds": 0.2}}) as service:
        with service.client() as client:
            client.get("/livez")
            before = time.monotonic()
            answer = client.get("/generate", params={"prompt": "one two three"})
            took = time.monotonic() - before
            overhead = int(answer.headers["x-llm-overhead-us"]) / 1e6
            assert took > 0.6
            assert 0 < overhead < took - 0.5
            body = {"prompt": "one two three", "stream": True}
            before = time.monotonic()
            with client.stream("POST", "/generate", json=body) as stream:
                took = time.monotonic() - before
                assert 0 < int(stream.headers["x-llm-overhead-us"]) / 1e6 < took - 0.1
                assert stream.headers["x-llm-cache"] == "bypass"
        assert service.metrics()['llm_gateway_overhead_seconds_count{cache="bypass"}'] == 2


def test_metrics_are_served_on_a_listener_of_their_own(echo: Service, client: httpx.Client) -> None:
    before = echo.metrics()
    with client.stream("POST", "/generate", json={"prompt": "one two", "stream": True}) as answer:
        answer.read()
    after = echo.metrics()
    grown = {name for name, value in after.items() if value > before.get(name, 0)}
    assert {
        'llm_requests_total{route="/generate",status="200"}',
        'llm_tokens_total{kind="completion",model="echo"}',
        'llm_time_to_first_token_seconds_count{model="echo"}',
        'llm_e2e_seconds_count{model="echo"}',
    } <= grown
    assert after['llm_engine_up{model="echo"}'] == 1
    assert client.get("/metrics").status_code == 404
