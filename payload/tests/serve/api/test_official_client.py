"""Conversations with OpenAI's own client, which sends its message objects back as it has received them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from questions import CHAT, error
from scripted_upstream import END, USAGE, Script, ScriptedUpstream, answer, chunk, stream
from service import Service, running

from llmserve.fields import DROPPED
from llmserve.gateway.parsed_requests import ParsedRequests, chat, embedding
from llmserve.protocol import Hello

QUESTION = {"role": "user", "content": "Which time is it?"}
FUNCTION = {"name": "now", "arguments": '{"zone": "UTC"}'}
TOOLS: Any = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
CALL = {"id": "call-1", "type": "function", "function": FUNCTION}
# What vLLM adds to the messages of its answers.
OF_VLLM: dict[str, Any] = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": None,
}
SAID = {"role": "assistant", "content": "Ask me.", **OF_VLLM, "tool_calls": []}
CALLED = {"role": "assistant", "content": None, **OF_VLLM, "tool_calls": [CALL]}
TOLD = {
    "role": "assistant",
    "content": "Noon.",
    **OF_VLLM,
    "reasoning": "The tool says so.",
    "tool_calls": [],
}


def whole(message: dict[str, Any]) -> Script:
    """vLLM's answer with this message."""
    reason = "tool_calls" if message["tool_calls"] else "stop"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    usage = {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}
    shape = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return answer({**shape, "usage": usage})


def streamed(message: dict[str, Any]) -> Script:
    """The same answer as a stream."""

    def event(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        shape = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        return chunk({**shape, "choices": [choice]})

    calls = [{"index": number, **call} for number, call in enumerate(message["tool_calls"])]
    pieces = [{"tool_calls": calls}] if calls else [{"content": word} for word in message["content"].split()]
    last = event({}, "tool_calls" if calls else "stop")
    return stream(event({"role": "assistant", "content": ""}), *map(event, pieces), last, USAGE, END)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedUpstream, Service]]:
    """A scripted server that supports tools, and a gateway in front of it."""
    folder = tmp_path_factory.mktemp("played")
    server = ScriptedUpstream(folder / "upstream.sock")
    described = {"socket": str(folder / "upstream.sock"), "revision": "7", "fields": ["tools", "user"]}
    with running(folder, {}, remotes={"m": described}) as service:
        yield server, service
    server.stop()


def official(service: Service) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=service.key, base_url="http://llm/v1", http_client=service.client(), max_retries=0
    )


def next_message(client: openai.OpenAI, streaming: bool, **request: Any) -> Any:
    """The answer's message, as the client makes it."""
    if not streaming:
        return client.chat.completions.create(**request).choices[0].message
    with client.chat.completions.stream(**request) as events:
        return events.get_final_completion().choices[0].message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_of_three_turns_with_an_engine_of_ours(echo: Service, streaming: bool) -> None:
    with official(echo) as client:
        messages: list[Any] = []
        for words in "one two", "three", "four five six":
            messages.append({"role": "user", "content": words})
            messages.append(next_message(client, streaming, model="echo", messages=messages))
            assert messages[-1].content == words
    assert len(messages) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_of_three_turns_with_the_result_of_a_tool(
    played: tuple[ScriptedUpstream, Service], streaming: bool
) -> None:
    server, service = played
    play = streamed if streaming else whole
    request: dict[str, Any] = {"model": "m", "tools": TOOLS}
    with official(service) as client:
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        server.script = play(SAID)
        messages.append(next_message(client, streaming, messages=messages, **request))
        messages.append(QUESTION)
        server.script = play(CALLED)
        messages.append(next_message(client, streaming, messages=messages, **request))
        (call,) = messages[-1].tool_calls
        assert json.loads(call.function.arguments) == {"zone": "UTC"}
        messages.append({"role": "tool", "tool_call_id": call.id, "name": "now", "content": "12:00"})
        server.script = play(TOLD)
        messages.append(next_message(client, streaming, messages=messages, **request))
        assert messages[-1].content == "Noon."
        messages.append({"role": "user", "content": "Thanks"})
        next_message(client, streaming, messages=messages, model="m")  # and offers no tools any more
    sent = server.requests[-1]
    assert "tools" not in sent
    roles = "user", "assistant", "user", "assistant", "tool", "assistant", "user"
    assert tuple(each["role"] for each in sent["messages"]) == roles
    assert [sorted(each) for each in sent["messages"] if each["role"] == "assistant"] == [
        ["content", "role"],
        ["content", "role", "tool_calls"],
        ["content", "role"],
    ]
    (passed,) = sent["messages"][3]["tool_calls"]
    assert (passed["id"], passed["function"]["name"]) == ("call-1", "now")
    assert sent["messages"][4] == {
        "role": "tool",
        "tool_call_id": "call-1",
        "name": "now",
        "content": "12:00",
    }


def asking(message: dict[str, Any] | None = None, **change: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [QUESTION, message or {"role": "user", "content": "x"}], **change}


@pytest.mark.parametrize("name", sorted(DROPPED))
def test_a_field_without_influence_is_accepted_and_not_passed_on(
    played: tuple[ScriptedUpstream, Service], name: str
) -> None:
    server, service = played
    server.script = whole(SAID)
    with service.client() as client:
        assert client.post(CHAT, json=asking(**{name: {"any": ["value"]}})).status_code == 200
    assert name not in server.requests[-1]


@pytest.mark.parametrize(
    "more",
    [
        *({name: "any value"} for name in ("refusal", "reasoning", "reasoning_content", "parsed")),
        {"provider_specific_fields": {"a": 1}},
        {"annotations": [{"type": "url_citation"}]},
        *({name: None} for name in ("audio", "function_call", "made_up")),
        {"tool_calls": []},
    ],
)
def test_what_clients_add_to_an_answer_they_send_back_is_dropped(
    played: tuple[ScriptedUpstream, Service], more: dict[str, Any]
) -> None:
    server, service = played
    server.script = whole(SAID)
    back = {"role": "assistant", "content": "Noon."}
    with service.client() as client:
        assert client.post(CHAT, json=asking({**back, **more})).status_code == 200
    assert server.requests[-1]["messages"] == [QUESTION, back]


def test_the_name_of_a_message_is_passed_on_for_templates_render_it(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    server.script = whole(SAID)
    with service.client() as client:
        client.post(CHAT, json=asking({"role": "user", "content": "x", "name": "ada"}))
        assert server.requests[-1]["messages"][1]["name"] == "ada"
        refused = client.post(CHAT, json=asking({"role": "user", "content": "x", "name": "a" * 257}))
        assert error(refused, 400, "invalid_value")["param"] == "messages.1.name"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages.1.audio"),
        ({"role": "assistant", "content": "x", "function_call": FUNCTION}, "messages.1.function_call"),
        ({"role": "user", "content": "x", "made_up": 1}, "messages.1.made_up"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "detail": 1}]}, "messages.1.content.0.detail"),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    client: httpx.Client, message: dict[str, Any], param: str
) -> None:
    refused = error(client.post(CHAT, json=asking(message, model="echo")), 400, "unsupported_field")
    assert refused["param"] == param
    assert param in refused["message"]


def test_an_unknown_field_may_be_null_wherever_unknown_fields_are_refused(client: httpx.Client) -> None:
    null = {"made_up": None, "prediction": None}
    parts = [{"type": "text", "text": "x", **null}]
    body = asking({"role": "user", "content": parts, **null}, model="echo", **null)
    body |= {"stream": True, "stream_options": {**null, "include_obfuscation": False}, "tools": []}
    assert client.post(CHAT, json=body).status_code == 200
    assert client.post("/v1/completions", json={"model": "echo", "prompt": "x", **null}).status_code == 200
    assert client.post("/generate", json={"prompt": "x", **null}).status_code == 200
    assert embedding(b'{"model": "m", "input": "x", "user": "ada", "made_up": null}', 0).generate.inputs == [
        "x"
    ]
    options: dict[str, Any] = {"stream": True, "stream_options": {"made_up": True}}
    refused = error(client.post(CHAT, json=asking(model="echo", **options)), 400, "unsupported_field")
    assert refused["param"] == "stream_options.made_up"


def test_tool_calls_in_the_history_are_refused_by_name_where_the_engine_has_no_tools(
    client: httpx.Client,
) -> None:
    result = {"role": "tool", "tool_call_id": "call-1", "content": "12:00"}
    body = {"model": "echo", "messages": [QUESTION, {"role": "assistant", "tool_calls": [CALL]}, result]}
    message = error(client.post(CHAT, json=body), 400, "unsupported_field")["message"]
    assert "'messages.1.tool_calls', 'messages.2.tool_call_id'" in message


def test_fields_without_influence_are_in_neither_the_cache_key_nor_the_record() -> None:
    requests = ParsedRequests(lambda text: text, b"secret")
    hello = Hello("m", "r1", "echo", context=100, slots=1)
    plain = asking({"role": "assistant", "content": "Noon."}, temperature=0)
    more = asking({"role": "assistant", "content": "Noon.", "refusal": None, "reasoning": "x"}, temperature=0)
    more |= {"user": "ada", "metadata": {"a": "b"}, "made_up": None, "tools": []}
    parsed = [requests.read("research", chat, 9, json.dumps(body).encode()) for body in (plain, more)]
    assert len({each.key("research", 1, hello) for each in parsed}) == 1
    assert len({each.proof for each in parsed}) == 1
