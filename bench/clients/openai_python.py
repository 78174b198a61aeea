"""openai-python, as in its README."""

import json
from typing import Any

import openai
from steps import (
    FOLLOW_UP,
    FUNCTION,
    QUESTION,
    TOKENS,
    TOOL,
    TOOL_QUESTION,
    Server,
    Town,
    check_weather_loop,
    run,
    weather,
)

ASKED: list[Any] = [{"role": "user", "content": QUESTION}]


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0)


def fields(server: Server) -> dict[str, Any]:
    return {"model": server.model, "max_completion_tokens": TOKENS, "temperature": 0}


def list_models(server: Server) -> None:
    assert server.model in [model.id for model in connect(server).models.list()]


def answer(server: Server) -> None:
    completion = connect(server).chat.completions.create(messages=ASKED, **fields(server))
    assert completion.choices[0].message.content


def stream(server: Server) -> None:
    chunks = connect(server).chat.completions.create(messages=ASKED, stream=True, **fields(server))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def second_turn(server: Server) -> None:
    client = connect(server)
    first = client.chat.completions.create(messages=ASKED, **fields(server)).choices[0].message
    with client.chat.completions.stream(messages=ASKED, **fields(server)) as events:
        streamed = events.get_final_completion().choices[0].message
    for message in first, streamed:
        turns = [*ASKED, message, {"role": "user", "content": FOLLOW_UP}]
        assert client.chat.completions.create(messages=turns, **fields(server)).choices[0].message.content


def tool_loop(server: Server) -> None:
    client = connect(server)
    messages: list[Any] = [{"role": "user", "content": TOOL_QUESTION}]
    asked = {**fields(server), "messages": messages, "tools": [TOOL]}
    message = client.chat.completions.create(**asked, tool_choice="required").choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        result = weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    final = client.chat.completions.create(**asked, tool_choice="none").choices[0].message
    check_weather_loop(final.content)


def structured_output(server: Server) -> None:
    completion = connect(server).chat.completions.parse(
        messages=ASKED, response_format=Town, **fields(server)
    )
    assert isinstance(completion.choices[0].message.parsed, Town)


def responses(server: Server) -> None:
    """An answer, a stream, a tool loop and a structured output, each with the items of the response before."""
    client = connect(server)
    asked: Any = {"model": server.model, "max_output_tokens": TOKENS, "temperature": 0}
    items: list[Any] = [*ASKED]
    items += client.responses.create(**asked, input=items).output
    items.append({"role": "user", "content": TOOL_QUESTION})
    tools = [{"type": "function", **FUNCTION}]
    with client.responses.stream(**asked, input=items, tools=tools, tool_choice="required") as events:
        called = events.get_final_response().output
    items += called
    for call in called:
        result = weather(**json.loads(call.arguments))
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    check_weather_loop(
        client.responses.create(**asked, input=items, tools=tools, tool_choice="none").output_text
    )
    parsed = client.responses.parse(**asked, input=items, text_format=Town).output_parsed
    assert isinstance(parsed, Town)


if __name__ == "__main__":
    run(["openai"], list_models, answer, stream, second_turn, tool_loop, structured_output, responses)
