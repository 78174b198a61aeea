"""Requests of OpenAI's Responses API. Each becomes a request for chat completions, so that one path serves both.

The answers of this API are in `responses_api_answer`. `responses` renders those of the other endpoints.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError

from llmserve.api.errors import ApiError
from llmserve.api.requests import (
    MAX_MESSAGES,
    MAX_PARTS,
    Call,
    ChatBody,
    Nested,
    Stop,
    Strict,
    Temperature,
    Tokens,
    TopP,
    bad_request,
    chat_call,
    same,
    shorten,
    whole,
)
from llmserve.fields import DROPPED, PASSED, Few

NO_STORE = "no answer is stored here"
WHOLE_INPUT = f"{NO_STORE}: send the whole conversation as 'input'"
NO_PLACE = "answers of the Responses API have no place for it: ask /v1/chat/completions"
# Fields that this endpoint refuses though the class of `llmserve.fields` may let them pass, with what to do.
INSTEAD = {
    "access_programs": "programs of a provider do not exist here: remove it",
    "background": f"{NO_STORE} to be fetched later: set 'stream', or wait for the answer",
    "background_options": f"{NO_STORE} to be fetched later: remove it",
    "context_management": "conversations are not compacted here: send a shorter 'input'",
    "conversation": WHOLE_INPUT,
    "function_call": "send 'tool_choice'",
    "functions": "send 'tools'",
    "image": "no model here makes images: remove it",
    "logprob_token_ids": NO_PLACE,
    "logprobs": "send 'include' with \"message.output_text.logprobs\"",
    "max_completion_tokens": "send 'max_output_tokens'",
    "max_tokens": "send 'max_output_tokens'",
    "messages": "send 'input'",
    "n": "an answer of the Responses API has one choice: ask again, or ask /v1/chat/completions",
    "previous_response_id": WHOLE_INPUT,
    "prompt": "no prompts are stored here: send its text as 'instructions' or 'input'",
    "reasoning_effort": "send 'reasoning.effort'",
    "response_format": "send 'text.format'",
    "return_token_ids": NO_PLACE,
    "return_token_offsets": NO_PLACE,
    "return_tokens_as_token_ids": NO_PLACE,
    "store": f"{NO_STORE}: send false or leave it out, and keep the answer yourself",
    "truncation": "an input that is too long is refused, not cut: send 'disabled', or leave it out",
}
# Values of those fields that change nothing. Null changes nothing anywhere.
NEUTRAL = {name: PASSED[name].neutral for name in INSTEAD if name in PASSED} | {
    "background": False,
    "store": False,
    "truncation": "disabled",
}
# No influence on an answer of this API.
DROPPED_HERE = {
    "max_tool_calls": "it limits calls of a provider's tools, and there are none",
    "stream_options": "a stream always has its usage, and is never padded",
}
LOGPROBS = "message.output_text.logprobs"
# Names of a chat request, and what they are called here.
RENAMED = {
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
# Fields that only some engines take.
OF_ENGINES = "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "top_logprobs"
QUOTED = re.compile(r"'([\w.-]+)'")


class Unknown(BaseModel):
    """What is none of the kinds of a union. Validating it fails, with an error about its `type`."""


class UnknownPart(Unknown):
    type: Literal["input_text", "output_text", "refusal"]


class UnknownItem(Unknown):
    type: Literal["message", "function_call", "function_call_output", "reasoning"]


class UnknownFormat(Unknown):
    type: Literal["text", "json_object", "json_schema"]


def one_of(unknown: type[Unknown], default: str | None = None) -> Discriminator:
    """Chooses the arm of a union by `type`. Tags are in angle brackets, by which `json_path` leaves them out."""
    kinds = get_args(unknown.model_fields["type"].annotation)

    def tag(value: object) -> str:
        kind = value.get("type", default) if isinstance(value, dict) else None
        return f"<{kind}>" if kind in kinds else "<unknown>"

    return Discriminator(tag)


class InputText(Nested):
    """Text of a message, or of a function's result."""

    type: Literal["input_text"]
    text: str


class OutputText(Nested):
    """Text of an answer that is sent back."""

    no_influence = frozenset({"annotations", "logprobs"})
    type: Literal["output_text"]
    text: str


class Refusal(Nested):
    """Dropped, as `refusal` of a chat message is."""

    type: Literal["refusal"]
    refusal: str | None = None


Part = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[OutputText, Tag("<output_text>")]
    | Annotated[Refusal, Tag("<refusal>")]
    | SkipJsonSchema[Annotated[UnknownPart, Tag("<unknown>")]],
    one_of(UnknownPart),
]
TEXT_OR_LIST = Discriminator(lambda value: "<list>" if isinstance(value, list) else "<text>")
Parts = Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<list>")], TEXT_OR_LIST]


class MessageItem(Nested):
    """A message of a conversation; `type` may be left out."""

    no_influence = frozenset({"id", "phase", "status"})
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(Nested):
    """A call that the model has made."""

    no_influence = frozenset({"id", "status", "parsed_arguments"})
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class FunctionOutputItem(Nested):
    """The result of a call."""

    no_influence = frozenset({"id", "status"})
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Content


class ReasoningText(Nested):
    """Reasoning of an answer that is sent back."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Nested):
    """Its text becomes the `reasoning` of the assistant's message that follows it."""

    no_influence = frozenset({"id", "status", "summary", "encrypted_content"})
    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")]
    | SkipJsonSchema[Annotated[UnknownItem, Tag("<unknown>")]],
    one_of(UnknownItem, "message"),
]
Items = Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
Input = Annotated[Annotated[str, Tag("<text>")] | Annotated[Items, Tag("<list>")], TEXT_OR_LIST]


def only_functions(kind: object) -> object:
    """Tools of a provider run on its hosts; raises PydanticCustomError."""
    if kind != "function":
        message = "only functions are supported: offer the tool as a function, and run it in the client"
        raise PydanticCustomError("unsupported_tool", message)
    return kind


FunctionType = Annotated[Literal["function"], BeforeValidator(only_functions)]


class FunctionTool(Nested):
    """A function that the model may call. `parameters`: a JSON schema."""

    type: FunctionType
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Nested):
    """The function that the model must call."""

    type: FunctionType
    name: Annotated[str, Field(min_length=1)]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[FunctionChoice, Tag("<function>")],
    Discriminator(lambda value: "<function>" if isinstance(value, dict) else "<mode>"),
]


class PlainFormat(Nested):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Nested):
    """JSON by a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1)]
    wanted: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[PlainFormat, Tag("<text>")]
    | Annotated[PlainFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")]
    | SkipJsonSchema[Annotated[UnknownFormat, Tag("<unknown>")]],
    one_of(UnknownFormat),
]


class TextOptions(Nested):
    """The format of the text."""

    format: Format | None = None


class Reasoning(Nested):
    """How much a model reasons. An answer has the reasoning itself, never a summary."""

    no_influence = frozenset({"summary", "generate_summary"})
    effort: Annotated[str, Field(max_length=16)] | None = None


# Parts of an answer that it has only on request. Answers have none of the others, and their reasoning is never encrypted.
Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesBody(Strict):
    """Body of POST /v1/responses."""

    no_influence = frozenset(DROPPED) | frozenset(DROPPED_HERE)
    endpoint = "chat"

    model: str
    input: Input
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=4)] | None = None
    stream: bool | None = None
    include: Annotated[list[Include], Few] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(whole)] | None = None
    tools: Annotated[list[FunctionTool], Few] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """As for every body; and all that depends on the engine is optional, or not described."""
        reference = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(reference)
        properties = schema["properties"]
        optional = {
            name: row for name, row in schema["x-optional-fields"].items() if name not in {*INSTEAD, *RENAMED}
        }
        for name in OF_ENGINES:
            optional[name] = properties.pop(name)
        schema["x-optional-fields"] = optional
        items = properties["input"]["oneOf"][1]
        items["items"] = items["items"]["oneOf"][
            0
        ]  # messages: the others are of engines that reason or call functions
        properties["include"]["anyOf"][0]["items"]["enum"].remove(LOGPROBS)
        for name in "background", "store", "truncation":
            properties[name] = {"enum": [NEUTRAL[name], None]}
        return reference


@dataclass(slots=True)
class ResponsesCall(Call):
    """A chat request in the words of the Responses API.

    `repeated`: fields of the request that its answer has as well. `names`: what errors call fields of the chat request.
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
    """A tool, or the choice of one, as chat requests have it: all but the `type` is one level further down."""
    return {"type": "function", "function": sent(tool, "type")}


def response_format(chosen: Format) -> dict[str, Any]:
    """`text.format` as chat requests have it."""
    if isinstance(chosen, SchemaFormat):
        return {"type": "json_schema", "json_schema": sent(chosen, "type")}
    return {"type": chosen.type}


def sent(part: BaseModel, *without: str) -> dict[str, Any]:
    """The fields that the client has sent and that are not null."""
    return part.model_dump(by_alias=True, exclude_none=True, exclude=set(without))


def conversation(request: ResponsesBody) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages of the chat request, and the names of what they come from, by the names that they have there."""
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
    raise TypeError(f"an item of type '{item.type}' is no message")


def tool_call(item: FunctionCallItem) -> dict[str, Any]:
    """A call as messages of the assistant have it."""
    called = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": called}


def text(content: Content) -> str:
    """The text of all parts."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, InputText | OutputText))


def repeated(request: ResponsesBody) -> dict[str, object]:
    """The fields of a request that its answer has as well, with OpenAI's defaults."""
    chosen = request.text.format if request.text else None
    choice = request.tool_choice if request.tool_choice is not None else "auto"
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": (request.model_extra or {}).get("metadata"),
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        "temperature": request.temperature,
        "text": {"format": sent(chosen) if chosen else {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else sent(choice),
        "tools": [sent(tool) for tool in request.tools or ()],
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
