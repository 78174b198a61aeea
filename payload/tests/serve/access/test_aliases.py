"""Aliases of the policy: which model answers, what the record says of it, and what answers to a retired name tell."""

from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx
import pytest
from questions import error
from service import Service, events, eventually, running

DAY = 24 * 3600
MODELS: dict[str, dict[str, Any]] = {"first": {"driver": "echo"}, "large-2": {"driver": "echo"}}
ALIASES: dict[str, dict[str, str]] = {
    "default": {"model": "large-2"},
    "large-1": {"model": "large-2", "deprecated": "2026-11-01", "sunset": "2027-02-01"},
    "help": {"model": "support", "deprecated": "2026-11-02"},
    "lost": {"model": "nowhere"},
    "first": {"model": "large-2"},
}
EXPERIMENT: dict[str, object] = {
    "model": "support",
    "control": "first",
    "candidate": "large-2",
    "unit": "subject",
    "tenants": ["research"],
    "percent": 100,
    "salt": "0123456789abcdef",
    "shadow": 0,
    "guardrails": {"refusals": []},
}
CHAT = {"messages": [{"role": "user", "content": "one two"}]}
SAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "one two"},
    "/v1/responses": {"input": "one two"},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("aliases")
    with running(folder, MODELS, aliases=ALIASES, experiments={"support-12": EXPERIMENT}) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.mark.parametrize("path", SAMPLES)
def test_a_name_is_answered_by_the_model_that_it_leads_to(
    service: Service, client: httpx.Client, path: str
) -> None:
    before = service.metrics()
    answer = client.post(path, json={"model": "default", **SAMPLES[path]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == answer.headers["x-llm-model"] == "large-2"
    assert not {"deprecation", "sunset", "link"} & set(answer.headers)

    def records() -> list[dict[str, Any]]:
        request = answer.headers["x-request-id"]
        return [each for each in service.records() if each["http.request.id"] == request]

    eventually("both are recorded", lambda: len(records()) == 2)
    eventually("who uses which name is logged", lambda: '"llm.alias":"default"' in service.logs())
    assert [each.get("gen_ai.request.model") for each in records()] == ["large-2", None]
    counted = 'llm_tokens_total{kind="prompt",model="large-2"}'
    assert service.metrics()[counted] > before[counted]


@pytest.mark.parametrize("path", SAMPLES)
def test_the_answer_to_a_retired_name_says_since_when_and_who_follows(
    client: httpx.Client, path: str
) -> None:
    body = {"model": "large-1", **SAMPLES[path]}
    streamed = client.post(path, json=body | {"stream": True})
    assert events(streamed)
    for answer in client.post(path, json=body), streamed:
        assert answer.headers["x-llm-model"] == "large-2"
        assert answer.headers["deprecation"] == "@1793491200"
        assert parsedate_to_datetime(answer.headers["sunset"]).timestamp() == 1793491200 + 92 * DAY
        assert answer.headers["sunset"].endswith(" GMT")
        assert answer.headers["link"] == '</v1/models/large-2>; rel="successor-version"'


def test_a_refusal_of_a_retired_name_has_the_headers_too(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "large-1", "input": "x"})
    error(answer, 404, "wrong_endpoint")
    assert answer.headers["deprecation"] == "@1793491200"
    assert "deprecation" not in client.post("/v1/embeddings", json={"model": "default", "input": "x"}).headers


def test_a_request_that_names_no_model_goes_to_the_default(client: httpx.Client) -> None:
    for answer in client.get("/generate?prompt=x"), client.post("/generate", json={"prompt": "x"}):
        assert answer.json()["model"] == answer.headers["x-llm-model"] == "large-2"


def test_aliases_are_listed_with_what_they_lead_to(client: httpx.Client) -> None:
    listed = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert list(listed) == ["first", "large-2", "support", "default", "help", "large-1"]
    assert listed["large-2"]["alias_of"] is None
    assert listed["default"] == listed["large-2"] | {"id": "default", "alias_of": "large-2"}
    assert (listed["large-1"]["deprecated"], listed["large-1"]["sunset"]) == ("2026-11-01", "2027-02-01")
    for name, model in listed.items():
        answer = client.get(f"/v1/models/{name}")
        assert answer.json() == model
        assert ("deprecation" in answer.headers) == (model["deprecated"] is not None), name


def test_an_alias_of_what_an_experiment_is_about_tells_no_arm(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json={"model": "help", **CHAT})
    assert answer.json()["model"] == answer.headers["x-llm-model"] == "support"
    assert answer.headers["link"] == '</v1/models/support>; rel="successor-version"'
    assert "large" not in str(answer.headers) + answer.text


def test_an_alias_of_a_model_that_is_not_served_is_refused_by_name(client: httpx.Client) -> None:
    listed = [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert "lost" not in listed
    for path, body in SAMPLES.items():
        refused = error(client.post(path, json={"model": "lost", **body}), 404, "model_not_found")
        assert (
            "no model 'nowhere', to which the alias 'lost' leads: you may use 'first'" in refused["message"]
        )
    error(client.get("/v1/models/lost"), 404, "model_not_found")


def test_a_served_model_goes_before_an_alias_of_its_name_and_the_log_names_it(
    service: Service, client: httpx.Client
) -> None:
    answer = client.post("/v1/chat/completions", json={"model": "first", **CHAT})
    assert answer.headers["x-llm-model"] == "first"
    assert client.get("/v1/models/first").json()["alias_of"] is None
    client.post("/v1/chat/completions", json={"model": "first", **CHAT})
    eventually("it is logged", lambda: '"llm.alias":"first"' in service.logs())
    assert service.logs().count('"llm.alias":"first"') == 1
