"""LiteLLM's SDK, as in its documentation of providers with OpenAI's API."""

import json
from typing import Any

import litellm
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


def fields(server: Server) -> dict[str, Any]:
    address = {"model": f"openai/{server.model}", "api_base": server.base_url, "api_key": server.key}
    return {**address, "temperature": 0, "num_retries": 0}


def complete(server: Server, messages: list[Any], **more: Any) -> Any:
    return litellm.completion(messages=messages, max_tokens=TOKENS, **fields(server), **more)


def list_models(server: Server) -> None:
    models = litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=server.base_url,
        api_key=server.key,
    )
    assert server.model in [name.removeprefix("openai/") for name in models], models


def answer(server: Server) -> None:
    assert complete(server, ASKED).choices[0].message.content


def stream(server: Server) -> None:
    chunks = complete(server, ASKED, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def second_turn(server: Server) -> None:
    message = complete(server, ASKED).choices[0].message
    turns = [*ASKED, message, {"role": "user", "content": FOLLOW_UP}]
    assert complete(server, turns).choices[0].message.content


def tool_loop(server: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": TOOL_QUESTION}]
    message = complete(server, messages, tools=[TOOL], tool_choice="required").choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        result = weather(**json.loads(call.function.arguments))
        name = call.function.name
        messages.append({"tool_call_id": call.id, "role": "tool", "name": name, "content": result})
    final = complete(server, messages, tools=[TOOL], tool_choice="none").choices[0].message
    check_weather_loop(final.content)


def structured_output(server: Server) -> None:
    content = complete(server, ASKED, response_format=Town).choices[0].message.content
    Town.model_validate_json(content)


def responses(server: Server) -> None:
    items: list[Any] = [{"role": "user", "content": TOOL_QUESTION}]
    asked: dict[str, Any] = {**fields(server), "tools": [{"type": "function", **FUNCTION}]}
    asked["max_output_tokens"] = TOKENS
    called = litellm.responses(input=items, tool_choice="required", **asked).output
    items += called
    for call in called:
        result = weather(**json.loads(call.arguments))
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    final = litellm.responses(input=items, tool_choice="none", **asked).output
    check_weather_loop(final[-1].content[0].text)


if __name__ == "__main__":
    run(["litellm"], list_models, answer, stream, second_turn, tool_loop, structured_output, responses)
