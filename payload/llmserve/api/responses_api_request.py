"""Requests of OpenAI's Responses API: each becomes a request for chat completions, so that one path serves both.

Their bodies are in `responses_api_body`, the answers in `responses_api_answer`. (`responses` renders those of other endpoints.)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from llmserve.api.errors import ApiError
from llmserve.api.requests import Call, ChatBody, bad_request, chat_call, same, shorten
from llmserve.api.responses_api_body import (
    INSTEAD,
    LOGPROBS,
    NEUTRAL,
    Content,
    Format,
    FunctionCallItem,
    FunctionChoice,
    FunctionOutputItem,
    FunctionTool,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ResponsesBody,
    SchemaFormat,
)

# Names of a chat request, and what they are called here.
RENAMED = {
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
QUOTED = re.compile(r"'([\w.-]+)'")


@dataclass(slots=True)
class ResponsesCall(Call):
    """A chat request in the Responses API's format.

    `repeated`: request fields that the answer repeats. `names`: the names that errors use for fields of the chat request.
    """

    repeated: Mapping[str, object] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def responses_call(request: ResponsesBody, granted: int) -> ResponsesCall:
    """Convert a request; raises ApiError 400. `granted`: tokens of an answer, by the policy."""
    messages, places = conversation(request)
    names = {**RENAMED, **places}
    content = {**optional_fields(request), "messages": messages}
    try:
        call = chat_call(ChatBody.model_validate(content), granted)
    except ValidationError as error:
        raise renamed(bad_request(error), names) from None
    except ApiError as error:
        raise renamed(error, names) from None
    if request.max_output_tokens is not None:
        call.generate.length_field = "max_output_tokens"
    return ResponsesCall(call.model, call.generate, repeated=repeated(request), names=names)


def optional_fields(request: ResponsesBody) -> dict[str, Any]:
    """The chat request without its messages; raises ApiError 400 for fields that `INSTEAD` refuses."""
    fields: dict[str, Any] = {}
    for name, value in request.unknown().items():
        if name not in INSTEAD:
            fields[name] = value
        elif not same(value, NEUTRAL.get(name)):
            message = f"'{name}' is {shorten(value)}: {INSTEAD[name]}"
            raise ApiError(400, "unsupported_field", message, name)
    for name in "model", "temperature", "top_p", "seed", "stop", "stream", "parallel_tool_calls":
        if (value := getattr(request, name)) is not None:
            fields[name] = value
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
    if LOGPROBS in (request.include or ()):
        fields |= {
            "logprobs": True,
            **({"top_logprobs": request.top_logprobs} if request.top_logprobs else {}),
        }
    elif request.top_logprobs:
        message = f"'top_logprobs' is {request.top_logprobs}, but 'include' has no \"{LOGPROBS}\": send both"
        raise ApiError(400, "invalid_value", message, "top_logprobs")
    if request.tools is not None:
        fields["tools"] = [function(tool) for tool in request.tools]
    if request.tool_choice is not None:
        choice = request.tool_choice
        fields["tool_choice"] = choice if isinstance(choice, str) else function(choice)
    if request.text and request.text.format:
        fields["response_format"] = response_format(request.text.format)
    if request.reasoning and request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    return fields


def function(tool: FunctionTool | FunctionChoice) -> dict[str, Any]:
    """A tool or tool choice in the format of chat requests: everything but the `type` is one level further down."""
    return {"type": "function", "function": client_fields(tool, "type")}


def response_format(chosen: Format) -> dict[str, Any]:
    """`text.format` in the format of chat requests."""
    if isinstance(chosen, SchemaFormat):
        return {"type": "json_schema", "json_schema": client_fields(chosen, "type")}
    return {"type": chosen.type}


def client_fields(part: BaseModel, *without: str) -> dict[str, Any]:
    """The fields that the client sent and that are not null."""
    return part.model_dump(by_alias=True, exclude_none=True, exclude=set(without))


def conversation(request: ResponsesBody) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages of the chat request, and by their names there the names of the items that they come from."""
    messages: list[dict[str, Any]] = []
    places: dict[str, str] = {}
    if request.instructions is not None:
        places["messages.0"] = "instructions"
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}], places
    reasoning = ""
    growing = False  # whether the last message is the assistant's, which calls right after it belong to
    for number, item in enumerate(request.input):
        if isinstance(item, ReasoningItem):
            reasoning += "".join(part.text for part in item.content or ())
            continue
        if isinstance(item, FunctionCallItem) and growing:
            messages[-1].setdefault("tool_calls", []).append(tool_call(item))
        else:
            messages.append(message(item))
        growing = messages[-1]["role"] == "assistant"
        if growing and reasoning:
            messages[-1]["reasoning"] = messages[-1].get("reasoning", "") + reasoning
        reasoning = ""
        place = f"messages.{len(messages) - 1}"
        places.setdefault(place, f"input.{number}")
        if isinstance(item, FunctionCallItem):
            places.setdefault(f"{place}.tool_calls", f"input.{number}.type")
        elif isinstance(item, FunctionOutputItem):
            places[f"{place}.tool_call_id"] = f"input.{number}.type"
    return messages, places


def message(item: Item) -> dict[str, Any]:
    """An item as a message of its own."""
    if isinstance(item, MessageItem):
        return {"role": item.role, "content": text(item.content)}
    if isinstance(item, FunctionCallItem):
        return {"role": "assistant", "content": None, "tool_calls": [tool_call(item)]}
    if isinstance(item, FunctionOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": text(item.output)}
    raise TypeError(f"an item of type '{item.type}' is not a message")


def tool_call(item: FunctionCallItem) -> dict[str, Any]:
    """A call in the format of assistant messages."""
    called = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": called}


def text(content: Content) -> str:
    """The text of all parts."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, InputText | OutputText))


def repeated(request: ResponsesBody) -> dict[str, object]:
    """The request fields that the answer repeats, with OpenAI's defaults."""
    chosen = request.text.format if request.text else None
    choice = request.tool_choice if request.tool_choice is not None else "auto"
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": (request.model_extra or {}).get("metadata"),
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        "temperature": request.temperature,
        "text": {"format": client_fields(chosen) if chosen else {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else client_fields(choice),
        "tools": [client_fields(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
    }


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error with the client's names for fields of the chat request. `names`: as in `ResponsesCall`."""

    def here(name: str) -> str:
        """`messages.2.content` begins with `messages.2`."""
        head, rest = name, ""
        while head not in names and "." in head:
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
        return names[head] + rest if head in names else name

    message = QUOTED.sub(lambda quoted: f"'{here(quoted[1])}'", error.message)
    return replace(error, message=message, param=error.param and here(error.param))
