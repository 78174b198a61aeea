"""The length of an answer: bounded by the policy for the caller's roles, and by the model's context."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from questions import CHAT, error
from scripted_upstream import ScriptedUpstream, answer
from service import Service, running

QUESTION: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "x"}]}
FIELDS = ["max_tokens", "max_completion_tokens"]
DEVELOPER, TRAINER, CONTEXT = 2048, 8192, 4096  # of the policy, and of the engine `echo`


def words(number: int, **change: Any) -> dict[str, Any]:
    """A chat whose prompt has so many tokens; the engine repeats them."""
    return {"model": "echo", "messages": [{"role": "user", "content": "word " * number}], **change}


@pytest.fixture(scope="module")
def trainer(echo: Service) -> Iterator[httpx.Client]:
    """A client whose role may have longer answers than the engine's context."""
    key = echo.add_key("alan", "research", "--role", "trainer")["key"]
    with echo.client(key) as client:
        yield client


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("length", [2000, DEVELOPER])
def test_a_length_that_the_policy_grants_is_served(client: httpx.Client, name: str, length: int) -> None:
    assert client.post(CHAT, json={**QUESTION, name: length}).status_code == 200


@pytest.mark.parametrize("name", FIELDS)
def test_a_length_within_a_wider_role_and_the_context_is_served(trainer: httpx.Client, name: str) -> None:
    assert trainer.post(CHAT, json={**QUESTION, name: 4000}).status_code == 200


@pytest.mark.parametrize("name", FIELDS)
def test_a_length_beyond_the_policy_is_refused_with_field_value_limit_and_source(
    client: httpx.Client, name: str
) -> None:
    refused = error(client.post(CHAT, json={**QUESTION, name: 4000}), 400, "invalid_value")
    assert refused["param"] == name
    for part in f"'{name}' is 4000", f"the limit is {DEVELOPER}", "the policy for your roles":
        assert part in refused["message"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_length_beyond_the_context_is_refused_with_field_value_limit_and_source(
    trainer: httpx.Client, name: str
) -> None:
    body = {**QUESTION, name: TRAINER}
    refused = error(trainer.post(CHAT, json=body), 400, "context_length_exceeded")
    assert refused["param"] == name
    for part in f"'{name}' is {TRAINER}", f"the limit is {CONTEXT}", "the context of the model 'echo'":
        assert part in refused["message"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_length_that_the_prompt_leaves_no_room_for_is_refused_by_the_name_sent(
    client: httpx.Client, name: str
) -> None:
    refused = error(client.post(CHAT, json=words(4000, **{name: 500})), 400, "context_length_exceeded")
    assert f"the prompt has 4000 tokens and {name} is 500" in refused["message"]
    assert f"lower {name}" in refused["message"]


def test_an_answer_without_a_length_may_use_what_the_context_leaves(client: httpx.Client) -> None:
    for prompt, expected, reason in (1000, 1000, "stop"), (2500, CONTEXT - 2500, "length"):
        answered = client.post(CHAT, json=words(prompt)).json()
        assert answered["usage"]["completion_tokens"] == expected
        assert answered["choices"][0]["finish_reason"] == reason


def test_an_answer_without_a_length_ends_at_the_limit_of_the_policy(tmp_path: Path) -> None:
    with (
        running(tmp_path, {"echo": {"driver": "echo", "context": 3 * DEVELOPER}}) as service,
        service.client() as client,
    ):
        answered = client.post(CHAT, json=words(DEVELOPER + 5)).json()
    assert answered["usage"]["completion_tokens"] == DEVELOPER


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    message = "max_tokens is 1500: this model's maximum context length is 1600"
    server.script = answer({"error": {"message": message, "param": "max_tokens", "code": 400}}, 400)
    yield server
    server.stop()


@pytest.mark.parametrize(("context", "lengths"), [(4096, [DEVELOPER, None]), (1600, [None])])
def test_an_upstream_is_left_to_use_its_context_where_that_is_shorter(
    tmp_path: Path, upstream: ScriptedUpstream, context: int, lengths: list[int | None]
) -> None:
    """A null, since the default of vLLM's completions is 16."""
    remote = {"socket": str(tmp_path / "upstream.sock"), "revision": "7", "context": context}
    with running(tmp_path, {}, remotes={"m": remote}) as service, service.client() as client:
        for path, body in (
            (CHAT, {**QUESTION, "model": "m"}),
            ("/v1/completions", {"model": "m", "prompt": "x"}),
        ):
            upstream.requests.clear()
            error(client.post(path, json=body), 400, "context_length_exceeded")
            assert [each["max_tokens"] for each in upstream.requests] == lengths


def test_an_upstreams_refusal_names_the_field_that_the_client_sent(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    remote = {"socket": str(tmp_path / "upstream.sock"), "revision": "7"}
    with running(tmp_path, {}, remotes={"m": remote}) as service, service.client() as client:
        for name in FIELDS:
            body = {**QUESTION, "model": "m", name: 1500}
            refused = error(client.post(CHAT, json=body), 400, "context_length_exceeded")
            assert refused["param"] == name
            assert refused["message"].startswith(f"{name} is 1500")
