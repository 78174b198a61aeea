"""One rule for the fields of a request: the tables know every field of vLLM's and OpenAI's, and each is treated as they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase

from llmserve.api.errors import ApiError
from llmserve.api.requests import (
    MAX_DEPTH,
    MAX_VALUES,
    ChatBody,
    CompletionBody,
    Strict,
    chat_call,
    completion_call,
    parse_body,
)
from llmserve.fields import DROPPED, PASSED, REFUSED
from llmserve.gateway.completions import answer_tokens

ROOT = Path(__file__).parents[4]
VLLM = json.loads((Path(__file__).parent / "vllm-fields.json").read_text())
OWN = {"chat": set(ChatBody.model_fields), "completion": set(CompletionBody.model_fields)}
OTHERS: dict[str, dict[str, set[str]]] = {
    "vLLM": {"chat": set(VLLM["ChatCompletionRequest"]), "completion": set(VLLM["CompletionRequest"])},
    "OpenAI": {
        "chat": set(chat_params.CompletionCreateParamsBase.__annotations__),
        "completion": set(CompletionCreateParamsBase.__annotations__),
    },
}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def extra(**fields: Any) -> dict[str, Any]:
    """What an engine gets of a chat request's fields."""
    return chat_call(parse_body(ChatBody, json.dumps(CHAT | fields).encode()), 2048).generate.extra


def test_the_recorded_fields_are_those_of_the_locked_vllm() -> None:
    (locked,) = (
        wheel["version"]
        for key, wheel in yaml.safe_load((ROOT / "artifacts.lock.d/gpu.yml").read_text())["wheels"].items()
        if key.startswith("vllm==")
    )
    assert VLLM["version"] == locked, "run tests/helpers/vllm_fields.py, and give each new field a class"


@pytest.mark.parametrize("api", OTHERS)
@pytest.mark.parametrize("endpoint", OWN)
def test_every_field_has_a_class(api: str, endpoint: str) -> None:
    known = OWN[endpoint] | DROPPED.keys() | PASSED.keys() | REFUSED.keys()
    assert OTHERS[api][endpoint] - known == set()
    wrong = {
        name
        for name, row in PASSED.items()
        if name in OTHERS[api][endpoint] and endpoint not in row.endpoints and name not in OWN[endpoint]
    }
    assert wrong == set(), f"{api} has them at this endpoint"


def test_no_field_has_two_classes_and_each_is_somebodys() -> None:
    named = [*DROPPED, *PASSED, *REFUSED]
    assert sorted(named) == sorted(set(named))
    everybodys = set().union(*(names for api in OTHERS.values() for names in api.values()))
    withdrawn = {"functions", "function_call", "best_of", "logits_processors"}  # by OpenAI, by vLLM
    assert set(named) - everybodys - withdrawn == set()


@pytest.mark.parametrize("name", DROPPED)
def test_a_field_without_influence_is_dropped_whatever_it_is(name: str) -> None:
    assert extra(**{name: {"any": [1]}}) == {}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_named_with_the_reason(name: str) -> None:
    with pytest.raises(ApiError) as refused:
        extra(**{name: 1})
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "unsupported_field", name)
    assert f"'{name}' ({REFUSED[name]})" in str(refused.value.message)


@pytest.mark.parametrize("name", [*REFUSED, *PASSED, "made_up"])
def test_null_is_no_value(name: str) -> None:
    assert extra(**{name: None}) == {}


@pytest.mark.parametrize(
    "name", [name for name, row in PASSED.items() if row.neutral is not None and "chat" in row.endpoints]
)
def test_a_value_that_changes_nothing_needs_no_engine(name: str) -> None:
    assert extra(**{name: PASSED[name].neutral}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("top_k", 40), ("min_p", 0.05), ("logit_bias", {"15043": -100}), ("stop_token_ids", [2, 7]),
        ("presence_penalty", 1), ("logprobs", True), ("tool_choice", "required"), ("ignore_eos", True),
        ("response_format", {"type": "json_object"}), ("tools", [{"type": "function", "function": {"name": "now"}}]),
    ],
)  # fmt: skip
def test_what_changes_an_answer_is_passed_on(name: str, value: object) -> None:
    assert extra(**{name: value}) == {name: value}


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("n", 10_000, "n"), ("n", True, "n"), ("n", "2", "n"), ("top_k", -2, "top_k"), ("min_p", 1.5, "min_p"),
        ("logit_bias", {"x": 1}, "logit_bias.x"), ("logit_bias", {"1": 101}, "logit_bias.1"),
        ("logit_bias", {str(token): 1 for token in range(1025)}, "logit_bias"), ("stop_token_ids", [-1], "stop_token_ids.0"),
        ("stop_token_ids", [1] * 129, "stop_token_ids"), ("tools", {}, "tools"), ("tools", [{}] * 129, "tools"),
        ("presence_penalty", 2.5, "presence_penalty"), ("store", True, "store"), ("top_logprobs", 21, "top_logprobs"),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_by_its_place(name: str, value: object, where: str) -> None:
    with pytest.raises(ApiError) as refused:
        extra(**{name: value})
    assert refused.value.code == "invalid_value"
    assert str(refused.value.param).startswith(where)


def test_tokens_are_reserved_for_each_of_several_answers() -> None:
    asked = json.dumps(CHAT | {"n": 4, "max_tokens": 100}).encode()
    assert answer_tokens(chat_call(parse_body(ChatBody, asked), 2048).generate) == 400


def nested(depth: int) -> dict[str, Any]:
    """A JSON schema of objects in objects."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "seen"),
    [
        (nested(MAX_DEPTH), f"more than {MAX_DEPTH} levels"),
        ({"enum": [0] * MAX_VALUES}, f"more than {MAX_VALUES} values"),
    ],
)
def test_a_schema_is_no_deeper_and_no_larger_than_engines_shall_walk(
    schema: dict[str, Any], seen: str
) -> None:
    assert extra(response_format={"type": "json_schema", "json_schema": {"schema": nested(10)}})
    with pytest.raises(ApiError, match=seen):
        extra(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def test_a_field_of_the_other_endpoint_is_refused() -> None:
    body = {"model": "m", "prompt": "x", "tools": [{"type": "function"}]}
    with pytest.raises(ApiError, match="unsupported: 'tools'"):
        completion_call(parse_body(CompletionBody, json.dumps(body).encode()), 2048)
    with pytest.raises(ApiError, match="unsupported: 'suffix'"):
        extra(suffix="x")


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_the_openapi_document_has_the_tables(body: type[Strict]) -> None:
    schema = body.model_json_schema()
    optional = {name for name, row in PASSED.items() if body.endpoint in row.endpoints}
    assert schema["x-optional-fields"].keys() == optional
    assert DROPPED.keys() <= schema["properties"].keys()
    assert schema["properties"].keys() & (optional | REFUSED.keys()) <= set(body.model_fields)
