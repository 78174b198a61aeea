"""Requests of clients (OpenAI's API and /generate): strict validation, and conversion into a `Call`."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import parse_qsl

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from llmserve.api.errors import ApiError
from llmserve.fields import DROPPED, PASSED, REFUSED, Endpoint
from llmserve.protocol import Generate, Hello

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]


def whole(value: object) -> object:
    """JSON has a single number type, so 5.0 is accepted as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[
    int,
    Field(gt=0, description="Limited by the policy for the caller's roles and by the model's context"),
    BeforeValidator(whole),
]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


# A body is validated on the event loop: lists are bounded, their first error ends them (fail_fast), and so is what
# becomes many small objects.
BARE_BYTES = 128 * 1024  # of a body, outside of its strings
MAX_INPUTS = 256  # texts in one request for embeddings
MANY_ERRORS = 100  # in one body
NAMED_FIELDS = 10  # in one refusal
MAX_MESSAGES, MAX_PARTS, MAX_CALLS = 4096, 1024, 256  # of a chat, of a message
MAX_DEPTH, MAX_VALUES = 64, 20_000  # of an object that is passed to an engine
Text = Annotated[str, Field(min_length=1)]


UNION_ARM = re.compile(r"(?:constrained-)?str|list\[.*\]|function-.*|<.*>")  # the last are tags of ours


class Strict(BaseModel):
    """No type coercion: a number in quotes is a string. Unknown fields are collected, see `unknown`.

    `no_influence`: fields that are accepted with any value, and dropped.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    no_influence: ClassVar[frozenset[str]] = frozenset()
    endpoint: ClassVar[Endpoint | None] = None  # whose optional fields it may have

    def unknown(self) -> dict[str, object]:
        """The fields outside the model that may change the answer, with their values."""
        extra = self.model_extra or {}
        return {
            name: value
            for name, value in extra.items()
            if value is not None and name not in self.no_influence
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema: every other field must be null, except optional ones for a model that takes them."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        schema["additionalProperties"] = {"type": "null"}
        dropped = {"description": "Accepted and dropped, because it does not affect the answer"}
        schema["properties"] |= dict.fromkeys(sorted(cls.no_influence), dropped)
        optional = {name: row for name, row in PASSED.items() if cls.endpoint in row.endpoints}
        if optional:
            schema["x-optional-fields"] = {name: row.values.json_schema() for name, row in optional.items()}
        return reference


class Nested(Strict):
    """An object inside a body: unlike in the body itself, no engine can declare further fields."""

    @model_validator(mode="after")
    def has_known_fields(self) -> Self:
        if names := [*self.unknown()]:
            raise PydanticCustomError(
                "unsupported_field", "unsupported fields", {"names": names[:NAMED_FIELDS]}
            )
        return self


class TextPart(Nested):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


def as_every_engine_takes_it(schema: dict[str, Any]) -> None:
    """Remove tool calls from the document, since they go with the field `tools`, which only some engines support."""
    properties = schema["properties"]
    del properties["tool_calls"], properties["tool_call_id"], properties["content"]["default"]
    properties["role"]["enum"].remove("tool")
    properties["content"]["anyOf"].remove({"type": "null"})
    schema["required"] = ["role", "content"]


class Message(Nested):
    """One message of a conversation. `developer` is OpenAI's newer name for `system`.

    Clients send answers back as they have received them, which is why some fields are dropped. `name` is passed on, since
    some chat templates render it.
    """

    model_config = ConfigDict(json_schema_extra=as_every_engine_takes_it)
    no_influence = frozenset(
        {
            "annotations",
            "parsed",
            "provider_specific_fields",
            "reasoning",
            "reasoning_content",
            "refusal",
        }
    )
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)] | None
    ) = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def says_something(self) -> "Message":
        """Only a message with tool calls may lack content; `tool_call_id` belongs to the role `tool`."""
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs 'content'")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the role 'assistant' may have 'tool_calls'")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("'tool_call_id' is required for the role 'tool', and allowed for no other")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it."""
        text = self.content
        if isinstance(text, list):
            text = "".join(part.text for part in text)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class StreamOptions(Nested):
    """Options of a stream. The usage comes with the last chunk only, also for clients that ask for vLLM's
    `continuous_usage_stats`.
    """

    no_influence = frozenset({"continuous_usage_stats", "include_obfuscation"})
    include_usage: bool = False


ONLY_IN_STREAMS: JsonDict = {
    "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
ONE_LENGTH: JsonDict = {
    "not": {
        "properties": {"max_tokens": {"type": "integer"}, "max_completion_tokens": {"type": "integer"}},
        "required": ["max_tokens", "max_completion_tokens"],
    }
}


class Sampling(Strict):
    """Fields shared by OpenAI's two completion endpoints."""

    model_config = ConfigDict(json_schema_extra=ONLY_IN_STREAMS)
    no_influence = frozenset(DROPPED)

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None


Collections = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=64)]],
    Field(
        fail_fast=True,
        min_length=1,
        max_length=16,
        description="Document collections, all of which the policy must let the caller read",
    ),
]


class ChatBody(Sampling):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra=ONLY_IN_STREAMS | ONE_LENGTH)
    endpoint = "chat"

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    collections: Collections | None = None


class CompletionBody(Sampling):
    """Body of POST /v1/completions."""

    endpoint = "completion"

    prompt: Annotated[str, Field(min_length=1)]


class GenerateBody(Strict):
    """Body of POST /generate, and the query of GET /generate. Greedy by default."""

    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: Tokens | None = None
    temperature: Temperature = 0.0
    stream: bool = False


class EmbeddingBody(Strict):
    """Body of POST /v1/embeddings. Texts only: token ids from another tokenizer would mean something else here."""

    no_influence = frozenset(DROPPED)

    model: str
    input: Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(gt=0), BeforeValidator(whole)] | None = None


@dataclass(slots=True)
class Call:
    """A validated request: the model, the engine's request, and what the client wants in the response. `collections`: document
    collections; if set, the answer must come from them alone.
    """

    model: str | None
    generate: Generate
    include_usage: bool = False
    dimensions: int | None = None
    collections: tuple[str, ...] = ()


def parse_body[T: BaseModel](kind: type[T], body: bytes) -> T:
    """Parse the JSON `body` as a `kind`; raises ApiError 400 or 413."""
    # Without many separators there cannot be many values, and counting them is quick.
    many = len(body) > BARE_BYTES and sum(map(body.count, b",[{")) > BARE_BYTES // 8
    if many and (bare := bare_bytes(body)) > BARE_BYTES:
        message = f"the body has at least {bare} bytes outside of strings, the limit is {BARE_BYTES}: send fewer values"
        raise ApiError(413, "body_too_large", message)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise bad_request(error) from None


def bare_bytes(body: bytes) -> int:
    """Bytes of JSON outside of strings: brackets, commas, numbers, spaces. For very many strings, which have as many separators,
    their number.
    """
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    return strings if strings > BARE_BYTES else sum(map(len, plain.split(b'"')[::2]))


def parse_query(query: bytes) -> GenerateBody:
    """Parse the query string of GET /generate; raises ApiError 400."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=32)
    except (UnicodeDecodeError, ValueError):
        raise ApiError(
            400, "invalid_query", "the query is not percent-encoded UTF-8: encode it, as 'curl -G' does"
        ) from None
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ApiError(
                400, "invalid_value", f"'{name[:80]}' is repeated in the query: send it once", name[:80]
            )
    try:
        return GenerateBody.model_validate_strings(dict(pairs), strict=False)
    except ValidationError as error:
        raise bad_request(error) from None


def bad_request(error: ValidationError) -> ApiError:
    """A 400 for the most specific error: what is wrong, the value seen, and what is expected."""
    if error.error_count() > MANY_ERRORS:  # listing them takes longer than all else
        message = f"the body has {error.error_count()} errors: send what GET /openapi.json describes"
        return ApiError(400, "invalid_value", message)
    mistake = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    if mistake["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: {mistake['ctx']['error']}")
    where = json_path(mistake["loc"])
    if not where:
        return ApiError(400, "invalid_type", f"the body must be a JSON object: {mistake['msg']}")
    if mistake["type"] == "missing":
        return ApiError(400, "missing_field", f"'{where}' is missing: it is required", where)
    if mistake["type"] == "extra_forbidden":
        return unsupported([where])
    if mistake["type"] == "unsupported_field":
        return unsupported([f"{where}.{name}" for name in mistake["ctx"]["names"]])
    value = shorten(mistake["input"])
    return ApiError(400, "invalid_value", f"'{where}' is {value}: {mistake['msg']}", where)


def bad_value(name: str, error: ValidationError) -> ApiError:
    """A 400 for the value of one field."""
    mistake = error.errors(include_url=False)[0]
    where = json_path((name, *mistake["loc"]))
    return ApiError(
        400, "invalid_value", f"'{where}' is {shorten(mistake['input'])}: {mistake['msg']}", where
    )


def json_path(location: tuple[int | str, ...]) -> str:
    """Location of an error in the body, without the names that pydantic gives to the members of a union."""
    return ".".join(str(part) for part in location if not UNION_ARM.fullmatch(str(part)))


def shorten(value: Any) -> str:
    """A value as JSON, cut to 80 characters; of a long list or object only its length."""
    if isinstance(value, list | dict) and len(value) > 100:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def unsupported(names: list[str]) -> ApiError:
    """A 400 that names up to NAMED_FIELDS fields."""
    listed = ", ".join(
        f"'{name[:80]}'" + (f" ({REFUSED[name]})" if name in REFUSED else "") for name in names[:NAMED_FIELDS]
    )
    return ApiError(
        400, "unsupported_field", f"unsupported: {listed}; remove it from the request", names[0][:80]
    )


def beyond(request: Strict) -> dict[str, object]:
    """The validated fields outside the model whose value is not a no-op; raises ApiError 400 for fields that this endpoint never
    passes to an engine.
    """
    used = {
        name: value
        for name, value in request.unknown().items()
        if name not in PASSED or not same(value, PASSED[name].neutral)
    }
    if bad := [name for name in used if name not in PASSED or request.endpoint not in PASSED[name].endpoints]:
        raise unsupported(bad)
    for name, value in used.items():
        try:
            used[name] = PASSED[name].values.validate_python(value)
        except ValidationError as error:
            raise bad_value(name, error) from None
    refuse_large(used)
    return used


def refuse_large(used: dict[str, object]) -> None:
    """Raise ApiError 400 for a value that is nested too deeply or has too many parts for engines to walk."""
    for name, value in used.items():
        level: list[object] = [value]
        parts = 0
        for _ in range(MAX_DEPTH):
            parts += len(level)
            level = [
                below
                for each in level
                if isinstance(each, dict | list)
                for below in (each.values() if isinstance(each, dict) else each)
            ]
            if not level or parts > MAX_VALUES:
                break
        if level or parts > MAX_VALUES:
            excess = (
                f"more than {MAX_VALUES} values" if parts > MAX_VALUES else f"more than {MAX_DEPTH} levels"
            )
            raise ApiError(400, "invalid_value", f"'{name}' has {excess}: send a smaller one", name)


def same(value: object, neutral: object) -> bool:
    """Equality as in JSON: true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def undeclared(generate: Generate, hello: Hello) -> list[str]:
    """The fields of a request that an engine has not declared in its Hello. One that supports `tools` supports tool calls in
    messages, also in a request that offers no tools.
    """
    used = [*generate.extra] if generate.seed is None else [*generate.extra, "seed"]
    bad = [name for name in used if name not in hello.fields]
    for name in generate.extra.get("chat_template_kwargs", ()):
        if name not in hello.template_arguments:
            bad.append(f"chat_template_kwargs.{name}")
    if "tools" in hello.fields:
        return bad
    return bad + [
        f"messages.{number}.{name}"
        for number, message in enumerate(generate.messages or [])
        for name in ("tool_calls", "tool_call_id")
        if name in message
    ]


def refuse_undeclared(
    generate: Generate, model: str, hello: Hello, others: Callable[[], Mapping[str, Hello]]
) -> None:
    """Raise ApiError 400 for fields that `model` has not declared. `others`: the models that the client may use."""
    if not (bad := undeclared(generate, hello)):
        return
    listed = ", ".join(f"'{name[:80]}'" for name in bad[:NAMED_FIELDS])
    able = [f"'{name}'" for name, other in others().items() if not undeclared(generate, other)]
    way_out = (
        f"use {' or '.join(able[:NAMED_FIELDS])}, or remove it" if able else "remove it from the request"
    )
    message = f"unsupported by the model '{model}': {listed}; {way_out}"
    raise ApiError(400, "unsupported_field", message, bad[0][:80])


def answer_length(tokens: int | None, granted: int, name: str = "max_tokens") -> tuple[int, bool]:
    """The maximum number of answer tokens, and whether the client left it unset; raises ApiError 400 or 403.

    `tokens`: the value of the client's field `name`. `granted`: the policy's limit.
    """
    if tokens is None and not granted:
        raise ApiError(
            403, "denied", "the policy does not let your roles generate tokens: ask for a role that may"
        )
    if tokens is None:
        return granted, True
    if tokens > granted:
        message = (
            f"'{name}' is {tokens}: the limit is {granted}, set by the policy for your roles; ask for less"
        )
        raise ApiError(400, "invalid_value", message, name)
    return tokens, False


def refuse_beyond_context(generate: Generate, model: str, context: int) -> None:
    """Raise ApiError 400 if the requested length alone exceeds the context of `model`. Only the engine knows the prompt's
    tokens.
    """
    if not generate.clip and generate.max_tokens > context:
        name = generate.length_field
        message = (
            f"'{name}' is {generate.max_tokens}: the limit is {context} for prompt and answer together, the context of the model "
            f"'{model}'; ask for less"
        )
        raise ApiError(400, "context_length_exceeded", message, name)


def sampling(request: Sampling, tokens: int | None, granted: int, name: str = "max_tokens") -> Generate:
    """The engine's request for either of OpenAI's endpoints, without the prompt; raises ApiError 400. The others are as for
    `answer_length`.
    """
    length, clip = answer_length(tokens, granted, name)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if request.stream_options and not request.stream:
        raise ApiError(
            400,
            "invalid_value",
            "'stream_options' is set but 'stream' is not true: set both",
            "stream_options",
        )
    return Generate(
        id=0,
        stream=bool(request.stream),
        max_tokens=length,
        clip=clip,
        length_field=name,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=stop,
        extra=beyond(request),
    )


def chat_call(request: ChatBody, granted: int) -> Call:
    """Convert a chat request; raises ApiError 400."""
    longest = request.max_completion_tokens
    if request.max_tokens is not None and longest is not None:
        raise ApiError(
            400,
            "invalid_value",
            "set 'max_completion_tokens' or 'max_tokens', not both",
            "max_completion_tokens",
        )
    if longest is None:
        generate = sampling(request, request.max_tokens, granted)
    else:
        generate = sampling(request, longest, granted, "max_completion_tokens")
    generate.messages = [message.plain() for message in request.messages]
    usage = bool(request.stream_options and request.stream_options.include_usage)
    return Call(request.model, generate, usage, collections=tuple(request.collections or ()))


def completion_call(request: CompletionBody, granted: int) -> Call:
    """Convert a completion request; raises ApiError 400."""
    generate = sampling(request, request.max_tokens, granted)
    generate.prompt = request.prompt
    usage = bool(request.stream_options and request.stream_options.include_usage)
    return Call(request.model, generate, usage)


def generate_call(request: GenerateBody, granted: int) -> Call:
    """Convert a request of /generate, which goes to the first model as a conversation of one message; raises ApiError
    400.
    """
    beyond(request)
    length, clip = answer_length(request.max_tokens, granted)
    messages = [{"role": "user", "content": request.prompt}]
    return Call(
        None,
        Generate(
            id=0,
            stream=request.stream,
            max_tokens=length,
            clip=clip,
            messages=messages,
            prompt=request.prompt,
            temperature=request.temperature,
        ),
    )


def embedding_call(request: EmbeddingBody) -> Call:
    """Convert a request for embeddings; raises ApiError 400."""
    beyond(request)
    inputs = [request.input] if isinstance(request.input, str) else request.input
    generate = Generate(0, False, 0, inputs=inputs, encoding=request.encoding_format)
    return Call(request.model, generate, dimensions=request.dimensions)


def refuse_other_work(generate: Generate, dimensions: int, size: int | None = None) -> None:
    """Raise ApiError 404 if a text model should embed, or the reverse, and 400 for another `size` than the model's
    `dimensions`.
    """
    if generate.inputs is None and dimensions:
        raise ApiError(404, "wrong_endpoint", "this model computes embeddings: use /v1/embeddings", "model")
    if generate.inputs is not None and not dimensions:
        raise ApiError(
            404,
            "wrong_endpoint",
            "this model computes no embeddings: GET /v1/models lists those that do",
            "model",
        )
    if size is not None and size != dimensions:
        message = f"'dimensions' is {size}: the model's vectors have {dimensions}, omit the field"
        raise ApiError(400, "invalid_value", message, "dimensions")
