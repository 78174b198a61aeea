"""POST /v1/responses with OpenAI's own client: an engine of ours, and a scripted server that reasons and calls functions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses import response_create_params as params
from pydantic import BaseModel, TypeAdapter
from questions import CHAT, error
from scripted_upstream import END, Script, ScriptedUpstream, answer, chunk, stream
from service import Service, eventually, running

from llmcore.ratings import ANSWERED, files, read
from llmserve.api.errors import ApiError
from llmserve.api.requests import MAX_MESSAGES, ChatBody
from llmserve.api.responses_api_body import DROPPED_HERE, INSTEAD, NEUTRAL, OF_ENGINES, ResponsesBody
from llmserve.api.responses_api_request import ResponsesCall
from llmserve.api.responses_api_shapes import ResponseObject
from llmserve.fields import DROPPED, PASSED, REFUSED
from llmserve.gateway.parsed_requests import responses

PATH = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOL: Any = {"type": "function", "name": "now", "parameters": PARAMETERS, "strict": False}
REASONING, TEXT, ARGUMENTS = "A tool knows.", "I ask.", '{"zone": "UTC"}'
CALL = {"id": "call-1", "type": "function", "function": {"name": "now", "arguments": ARGUMENTS}}
MESSAGE = {
    "role": "assistant",
    "content": TEXT,
    "reasoning": REASONING,
    "refusal": None,
    "tool_calls": [CALL],
}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 7,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def whole(message: dict[str, Any], reason: str = "stop", **more: Any) -> Script:
    """vLLM's answer with this message."""
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason, **more}
    shape = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return answer({**shape, "usage": USAGE})


def streamed(*deltas: dict[str, Any], reason: str = "stop") -> Script:
    """vLLM's stream with these pieces of a message."""

    def event(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return chunk({"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

    opening = event({"role": "assistant", "content": ""})
    last = chunk({"choices": [], "usage": USAGE})
    return stream(opening, *map(event, deltas), event({}, reason), last, END)


def piece_of_call(arguments: str, index: int = 0, **more: Any) -> dict[str, Any]:
    """A piece of a call; its first one has id and name."""
    function = {"arguments": arguments, **({"name": "now"} if more else {})}
    return {"tool_calls": [{"index": index, **more, "function": function}]}


PIECES = (
    {"reasoning": "A tool "},
    {"reasoning": "knows."},
    {"content": "I "},
    {"content": "ask."},
    piece_of_call("", id="call-1", type="function"),
    piece_of_call('{"zone": '),
    piece_of_call('"UTC"}'),
)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedUpstream, Service]]:
    """A scripted server that supports tools, and a gateway in front of it."""
    folder = tmp_path_factory.mktemp("played")
    server = ScriptedUpstream(folder / "upstream.sock")
    fields = [
        "tools",
        "tool_choice",
        "response_format",
        "reasoning_effort",
        "logprobs",
        "top_logprobs",
        "top_k",
    ]
    described = {"socket": str(folder / "upstream.sock"), "revision": "7", "fields": fields}
    with running(folder, {}, remotes={"m": described}) as service:
        yield server, service
    server.stop()


def official(service: Service) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=service.key, base_url="http://llm/v1", http_client=service.client(), max_retries=0
    )


def typed(response: Response) -> Response:
    """The client parses leniently; raises ValidationError where the answer is not of the client's own types."""
    return Response.model_validate(response.model_dump(mode="json", exclude_unset=True))


def test_an_answer_of_an_engine_of_ours(echo: Service) -> None:
    with official(echo) as client:
        asked = client.responses.create(
            model="echo",
            input="one two",
            instructions="Be brief.",
            temperature=0,
            max_output_tokens=50,
            metadata={"topic": "x"},
            store=False,
            truncation="disabled",
            include=["reasoning.encrypted_content"],
        )
    response = typed(asked)
    assert (response.output_text, response.status) == ("one two", "completed")
    assert response.id.startswith("resp_")
    (item,) = response.output
    assert (item.type, item.status, item.role) == ("message", "completed", "assistant")  # type: ignore[union-attr]
    assert response.usage
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (response.instructions, response.max_output_tokens) == ("Be brief.", 50)
    assert (response.metadata, response.temperature) == ({"topic": "x"}, 0)
    assert (response.tools, response.tool_choice, response.parallel_tool_calls) == ([], "auto", True)
    assert asked.to_dict()["store"] is False
    assert (response.previous_response_id, response.error, response.incomplete_details) == (None, None, None)


def test_a_stream_has_the_events_of_openai_in_order(echo: Service) -> None:
    with official(echo) as client:
        events = list(client.responses.create(model="echo", input="one two", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.model_dump(mode="json", exclude_unset=True))
    last = events[-1]
    assert last.type == "response.completed"
    assert (last.response.output_text, last.response.status) == ("one two", "completed")


def test_each_frame_of_a_stream_names_its_event_and_none_follows_the_last(client: httpx.Client) -> None:
    body = {"model": "echo", "input": "one", "stream": True, "stream_options": {"include_obfuscation": True}}
    got = client.post(PATH, json=body)
    assert got.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in got.text.removesuffix("\n\n").split("\n\n")]
    for name, data in frames:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert "[DONE]" not in got.text


def test_whole_answers_and_streams_of_one_request_have_the_same_output(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    with official(service) as client:
        server.script = whole(MESSAGE, "tool_calls")
        at_once = client.responses.create(model="m", input="When?", tools=[TOOL])
        server.script = streamed(*PIECES, reason="tool_calls")
        with client.responses.stream(model="m", input="When?", tools=[TOOL]) as events:
            kinds = [event.type for event in events]
            in_pieces = events.get_final_response()
    for response in at_once, in_pieces:
        reasoning, message, call = response.output
        assert reasoning.type == "reasoning"
        assert reasoning.content
        assert reasoning.content[0].text == REASONING
        assert (message.type, response.output_text) == ("message", TEXT)
        assert call.type == "function_call"
        assert (call.call_id, call.name, call.arguments) == ("call-1", "now", ARGUMENTS)
        assert response.usage
        assert response.usage.input_tokens_details.cached_tokens == 4
        assert response.usage.output_tokens_details.reasoning_tokens == 3
        assert (response.usage.input_tokens, response.usage.output_tokens) == (9, 7)
    typed(at_once)
    assert kinds.count("response.reasoning_text.delta") == 2
    assert kinds.count("response.function_call_arguments.delta") == 2
    assert kinds.count("response.function_call_arguments.done") == 1
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3


def test_two_calls_in_one_stream_are_two_items(played: tuple[ScriptedUpstream, Service]) -> None:
    server, service = played
    first, second = (
        piece_of_call("{}", id="a", type="function"),
        piece_of_call("{", 1, id="b", type="function"),
    )
    server.script = streamed(first, second, piece_of_call("}", 1), reason="tool_calls")
    with official(service) as client, client.responses.stream(model="m", input="x", tools=[TOOL]) as events:
        calls = events.get_final_response().output
    assert [(call.call_id, call.arguments) for call in calls if call.type == "function_call"] == [
        ("a", "{}"),
        ("b", "{}"),
    ]
    assert len({call.id for call in calls if call.type == "function_call"}) == 2


def test_a_conversation_goes_on_with_the_items_of_an_answer_and_the_result_of_a_call(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    server.script = whole(MESSAGE, "tool_calls")
    items: list[Any] = [{"role": "user", "content": "When?"}]
    with official(service) as client:
        first = client.responses.create(
            model="m", input=items, tools=[TOOL], instructions="Be brief.", tool_choice="auto"
        )
        items += first.output
        call = first.output[-1]
        assert call.type == "function_call"
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "12:00"})
        server.script = whole({"role": "assistant", "content": "Noon."})
        second = client.responses.create(
            model="m",
            input=items,
            tools=[TOOL],
            tool_choice={"type": "function", "name": "now"},
            reasoning={"effort": "low"},
        )
        assert second.output_text == "Noon."
        items += [
            *second.output,
            {"role": "developer", "content": [{"type": "input_text", "text": "Thank."}]},
        ]
        server.script = whole({"role": "assistant", "content": "Thanks."})
        client.responses.create(model="m", input=items, extra_body={"top_k": 3})
    called = {"role": "assistant", "content": TEXT, "tool_calls": [CALL]}
    turns = [
        {"role": "user", "content": "When?"},
        called,
        {"role": "tool", "content": "12:00", "tool_call_id": "call-1"},
    ]
    one, two, three = server.requests[-3:]
    assert one["messages"] == [{"role": "system", "content": "Be brief."}, *turns[:1]]
    function = {"name": "now", "parameters": PARAMETERS, "strict": False}
    assert one["tools"] == [{"type": "function", "function": function}]
    assert two["messages"] == turns
    assert two["tool_choice"] == {"type": "function", "function": {"name": "now"}}
    assert two["reasoning_effort"] == "low"
    assert three["messages"] == [
        *turns,
        {"role": "assistant", "content": "Noon."},
        {"role": "system", "content": "Thank."},
    ]
    assert three["top_k"] == 3


class Place(BaseModel):
    """What a structured answer has."""

    town: str


def test_an_answer_is_parsed_by_a_schema(played: tuple[ScriptedUpstream, Service]) -> None:
    server, service = played
    content = '{"town": "Bern"}'
    with official(service) as client:
        server.script = whole({"role": "assistant", "content": content})
        parsed = client.responses.parse(model="m", input="Where?", text_format=Place)
        assert parsed.output_parsed == Place(town="Bern")
        wanted = server.requests[-1]["response_format"]
        assert (wanted["type"], wanted["json_schema"]["name"]) == ("json_schema", "Place")
        assert wanted["json_schema"]["schema"]["required"] == ["town"]
        server.script = streamed({"content": content[:5]}, {"content": content[5:]})
        with client.responses.stream(model="m", input="Where?", text_format=Place) as events:
            assert events.get_final_response().output_parsed == Place(town="Bern")


def test_log_probabilities_come_if_they_are_included(played: tuple[ScriptedUpstream, Service]) -> None:
    server, service = played
    token = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}
    server.script = whole({"role": "assistant", "content": "Hi"}, logprobs={"content": [token]})
    with official(service) as client:
        response = client.responses.create(
            model="m", input="x", include=["message.output_text.logprobs"], top_logprobs=2
        )
    assert (server.requests[-1]["logprobs"], server.requests[-1]["top_logprobs"]) == (True, 2)
    (item,) = typed(response).output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert part.logprobs
    assert (part.logprobs[0].token, part.logprobs[0].logprob) == ("Hi", -0.5)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_is_cut_is_incomplete(echo: Service, streaming: bool) -> None:
    with official(echo) as client:
        if streaming:
            *_, last = client.responses.create(
                model="echo", input="one two", max_output_tokens=1, stream=True
            )
            assert last.type == "response.incomplete"
            response = last.response
        else:
            response = client.responses.create(model="echo", input="one two", max_output_tokens=1)
    assert (response.status, response.output_text) == ("incomplete", "one ")
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output if item.type == "message"] == ["incomplete"]


def test_an_answer_without_text_is_an_empty_message(played: tuple[ScriptedUpstream, Service]) -> None:
    server, service = played
    with official(service) as client:
        server.script = whole({"role": "assistant", "content": None})
        assert typed(client.responses.create(model="m", input="x")).output_text == ""
        server.script = streamed()
        with client.responses.stream(model="m", input="x") as events:
            (item,) = events.get_final_response().output
    assert item.type == "message"


def test_a_stream_that_breaks_ends_with_a_failed_response(played: tuple[ScriptedUpstream, Service]) -> None:
    server, service = played
    hello = chunk({"choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]})
    server.script = stream(hello, whole=False)
    with official(service) as client:
        *_, last = client.responses.create(model="m", input="x", stream=True)
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error
    assert last.response.error.to_dict()["code"] == "engine_lost"


@pytest.mark.parametrize(
    "script",
    [
        whole({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "tool_calls"),
        whole({"role": "assistant", "content": None, "tool_calls": [1]}, "tool_calls"),
    ],
)
def test_a_call_that_is_none_is_a_failure_of_the_engine(
    played: tuple[ScriptedUpstream, Service], script: Script
) -> None:
    server, service = played
    server.script = script
    with service.client() as client:
        error(client.post(PATH, json={"model": "m", "input": "x", "tools": [TOOL]}), 503, "engine_failed")


def test_an_answer_is_rated_and_recorded_and_kept_as_that_of_a_chat(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    feedback = {"folder": str(tmp_path / "journal")}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}]
    with running(tmp_path, feedback=feedback, tenants={"research": {"keep_prompts": True}}) as service:
        with service.client() as client:
            answered = client.post(
                PATH, json={"model": "echo", "input": "one two", "instructions": "Be brief."}
            )
            client.post(CHAT, json={"model": "echo", "messages": messages})
            identifier = answered.json()["id"]
            assert identifier == f"resp_{answered.headers['x-llm-response-id']}"
            rated = client.post("/v1/feedback", json={"id": identifier, "thumb": "up"})
            assert rated.json() == {"object": "feedback", "id": identifier, "text_kept": True}
        intents = [each for each in service.records() if "llmkeep.prompt.hmac" in each]
        assert [each["event.action"] for each in intents] == [f"POST {PATH}", f"POST {CHAT}"]
        assert len({each["llmkeep.prompt.hmac"] for each in intents}) == 1

        def exchanges() -> list[dict[str, Any]]:
            return [record for path in files(tmp_path / "journal", ANSWERED) for record in read(path)]

        first, second = eventually(
            "both answers are kept", lambda: exchanges() if len(exchanges()) == 2 else None
        )
        for name in "prompt", "answer":
            assert first[f"llmkeep.feedback.{name}"] == second[f"llmkeep.feedback.{name}"]


def test_a_model_is_found_by_its_name(echo: Service) -> None:
    with official(echo) as client:
        assert client.models.retrieve("echo").id == "echo"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.models.retrieve("gpt")


HELLO = {"role": "user", "content": "x"}


def refusal(**fields: Any) -> ApiError:
    """Of a request with these fields."""
    with pytest.raises(ApiError) as refused:
        responses(json.dumps({"model": "m", "input": "x"} | fields).encode(), 2048)
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", 'is "resp_1": no answers are stored here: send the whole'),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation as 'input'"),
        ({"background": True}, "background", "is true: no answers are stored here, so none can be fetched later: set 'stream'"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "send its text as 'instructions'"),
        ({"store": True}, "store", "is true: no answers are stored here: send false or leave it out"),
        ({"truncation": "auto"}, "truncation", "rejected, not truncated: send 'disabled'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", 'is "web_search": only functions are supported: offer'),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0.type", "run it in the client"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "is missing"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "only functions"),
        ({"tool_choice": "maybe"}, "tool_choice", "Input should be 'none', 'auto' or 'required'"),
        ({"input": [HELLO, {"type": "web_search_call", "id": "w"}]}, "input.1.type", 'is "web_search_call": Input should be'),
        ({"input": [HELLO, {"type": "item_reference", "id": "w"}]}, "input.1.type", "'function_call_output' or 'reasoning'"),
        ({"input": [HELLO, {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.1.content.0.type",
            'is "input_image": Input should be'),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input.0.content.0.text", "is 1"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", 'is "tool"'),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id", "is missing"),
        ({"input": [HELLO | {"made_up": 1}]}, "input.0.made_up", "remove it"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "at least 1 item"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", 'is "grammar"'),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "remove it"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "remove it"),
        ({"include": ["made_up"]}, "include.0", 'is "made_up"'),
        ({"top_logprobs": 2}, "top_logprobs", "send both"),
        ({"max_output_tokens": 4096}, "max_output_tokens", "'max_output_tokens' is 4096: the limit is 2048"),
        ({"max_tokens": 5}, "max_tokens", "send 'max_output_tokens'"),
        ({"n": 2}, "n", "one choice"),
        ({"top_k": -3}, "top_k", "is -3"),
        ({"chat_template": "x"}, "chat_template", "the engine would execute it"),
        ({"made_up": 1}, "made_up", "remove it"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_clients_own_field_its_value_and_a_way_out(
    fields: dict[str, Any], param: str, words: str
) -> None:
    refused = refusal(**fields)
    assert refused.param == param
    assert f"'{param}'" in refused.message
    assert words in refused.message


def nested(depth: int) -> dict[str, Any]:
    """A JSON schema of objects in objects."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def test_what_is_deep_or_large_is_refused_in_the_clients_words() -> None:
    deep = {"format": {"type": "json_schema", "name": "deep", "schema": nested(40)}}
    assert "'text.format' has more than 64 levels" in refusal(text=deep).message
    assert "'tools' has more than 64 levels" in refusal(tools=[{**TOOL, "parameters": nested(40)}]).message
    assert refusal(input=[HELLO] * (MAX_MESSAGES + 1)).param == "input"
    calls = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * 257
    assert refusal(input=[HELLO, *calls]).param == "input.1.type"
    assert "'input.0.k9'" in refusal(input=[HELLO | {f"k{number}": 1 for number in range(200)}]).message
    assert "'k9'" in refusal(**{f"k{number}": 1 for number in range(2000)}).message
    with pytest.raises(ApiError) as refused:
        responses(b'{"model":"m","input":' + b"[" * 60_000 + b"]" * 60_000 + b"}", 2048)
    assert refused.value.code == "invalid_json"


def test_what_an_engine_does_not_take_is_refused_in_the_clients_words(client: httpx.Client) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "12:00"}
    body = {"model": "echo", "input": [HELLO, call, result], "text": {"format": {"type": "json_object"}}}
    body["reasoning"] = {"effort": "low"}
    refused = error(client.post(PATH, json=body), 400, "unsupported_field")
    for name in "input.1.type", "input.2.type", "text.format", "reasoning.effort":
        assert f"'{name}'" in refused["message"]
    included = {"model": "echo", "input": "x", "include": ["message.output_text.logprobs"]}
    assert error(client.post(PATH, json=included), 400, "unsupported_field")["param"] == "include"


def test_every_field_of_openai_and_of_chats_has_a_class_here() -> None:
    declared = set(ResponsesBody.model_fields)
    known = declared | DROPPED.keys() | DROPPED_HERE.keys() | INSTEAD.keys() | REFUSED.keys()
    of_openai = set(params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert of_openai - known == set()
    assert set(ChatBody.model_fields) - known == set()
    assert declared & (DROPPED_HERE.keys() | INSTEAD.keys()) == set()
    assert set(OF_ENGINES) <= declared
    schema = ResponsesBody.model_json_schema()
    passed = {name for name, row in PASSED.items() if "chat" in row.endpoints} - INSTEAD.keys()
    assert schema["x-optional-fields"].keys() == passed | set(OF_ENGINES)


@pytest.mark.parametrize("name", [*DROPPED, *DROPPED_HERE])
def test_a_field_without_influence_is_accepted_whatever_it_is(name: str) -> None:
    call = responses(json.dumps({"model": "m", "input": "x", name: {"any": [1]}}).encode(), 2048)
    assert call.generate.extra == {}


def test_a_value_that_changes_nothing_is_accepted() -> None:
    neutral = {**dict.fromkeys(INSTEAD), **NEUTRAL, "tools": [], "text": {"format": {"type": "text"}}}
    call = responses(json.dumps({"model": "m", "input": "x", **neutral}).encode(), 2048)
    assert isinstance(call, ResponsesCall)
    assert call.generate.extra == {}
    assert call.generate.messages == [{"role": "user", "content": "x"}]


def test_the_shape_in_the_openapi_document_is_that_of_every_answer(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    server.script = whole(MESSAGE, "tool_calls")
    body = {
        "model": "m",
        "input": "When?",
        "tools": [TOOL],
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low"},
    }
    with service.client() as client:
        ResponseObject.model_validate_json(client.post(PATH, json=body).content)
