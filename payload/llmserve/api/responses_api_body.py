"""Bodies of OpenAI's Responses API, and its fields beside those of `llmserve.fields`."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError

from llmserve.api.requests import (
    MAX_MESSAGES,
    MAX_PARTS,
    Nested,
    Stop,
    Strict,
    Temperature,
    Tokens,
    TopP,
    whole,
)
from llmserve.fields import DROPPED, PASSED, Few

NO_STORE = "no answers are stored here"
WHOLE_INPUT = f"{NO_STORE}: send the whole conversation as 'input'"
NO_PLACE = "answers of the Responses API have no place for it: use /v1/chat/completions"
# Fields that this endpoint refuses though the class of `llmserve.fields` may let them pass, with what to do.
INSTEAD = {
    "access_programs": "there are no provider programs here: remove it",
    "background": f"{NO_STORE}, so none can be fetched later: set 'stream', or wait for the answer",
    "background_options": f"{NO_STORE}, so none can be fetched later: remove it",
    "collections": "use /v1/chat/completions, which answers from documents",
    "context_management": "conversations are not compacted here: send a shorter 'input'",
    "conversation": WHOLE_INPUT,
    "function_call": "send 'tool_choice'",
    "functions": "send 'tools'",
    "image": "no model here generates images: remove it",
    "logprob_token_ids": NO_PLACE,
    "logprobs": "send 'include' with \"message.output_text.logprobs\"",
    "max_completion_tokens": "send 'max_output_tokens'",
    "max_tokens": "send 'max_output_tokens'",
    "messages": "send 'input'",
    "n": "an answer of the Responses API has one choice: send the request again, or use /v1/chat/completions",
    "previous_response_id": WHOLE_INPUT,
    "prompt": "no prompts are stored here: send its text as 'instructions' or 'input'",
    "reasoning_effort": "send 'reasoning.effort'",
    "response_format": "send 'text.format'",
    "return_token_ids": NO_PLACE,
    "return_token_offsets": NO_PLACE,
    "return_tokens_as_token_ids": NO_PLACE,
    "store": f"{NO_STORE}: send false or leave it out, and keep the answer yourself",
    "truncation": "an input that is too long is rejected, not truncated: send 'disabled', or leave it out",
}
# Values of those fields that change nothing. Null changes nothing anywhere.
NEUTRAL = {name: PASSED[name].neutral for name in INSTEAD if name in PASSED} | {
    "background": False,
    "store": False,
    "truncation": "disabled",
}
# No influence on an answer of this API.
DROPPED_HERE = {
    "max_tool_calls": "it limits calls of a provider's tools, and there are none here",
    "stream_options": "a stream always includes its usage and is never padded",
}
LOGPROBS = "message.output_text.logprobs"
# Fields that only some engines take.
OF_ENGINES = "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "top_logprobs"


class Unknown(BaseModel):
    """A value that matches no kind of a union. Validating it fails with an error about its `type`."""


class UnknownPart(Unknown):
    type: Literal["input_text", "output_text", "refusal"]


class UnknownItem(Unknown):
    type: Literal["message", "function_call", "function_call_output", "reasoning"]


class UnknownFormat(Unknown):
    type: Literal["text", "json_object", "json_schema"]


def one_of(unknown: type[Unknown], default: str | None = None) -> Discriminator:
    """Chooses the member of a union by `type`. Tags are in angle brackets, so that `json_path` can leave them out."""
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
    """The text of an earlier answer that the client sends back."""

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
    """The reasoning of an earlier answer that the client sends back."""

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
    """Rejects tools that a provider would run on its hosts; raises PydanticCustomError."""
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
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1)]
    definition: dict[str, Any] = Field(alias="schema")
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
    """How much a model reasons. An answer contains the reasoning itself, never a summary."""

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
        """As for every body; fields that depend on the engine are optional, or not described."""
        reference = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(reference)
        properties = schema["properties"]
        optional = {name: row for name, row in schema["x-optional-fields"].items() if name not in INSTEAD}
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
