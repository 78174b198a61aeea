"""Response bodies for the OpenAPI document. `responses` builds them by hand, and a test compares."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llmserve.protocol import FinishReason


class Shape(BaseModel):
    """Base: exactly the listed fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Usage(Shape):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(Shape):
    """The function of a call. `arguments`: JSON as text."""

    name: str
    arguments: str


class ToolCall(Shape):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Spoken(Shape):
    """The model's message. `content`: null where it only calls functions."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class Choice(Shape):
    """An answer; a request with `n` gets several. `logprobs`: in OpenAI's format for this endpoint, if requested."""

    index: int
    logprobs: dict[str, Any] | None


class ChatChoice(Choice):
    """An answer of a chat completion."""

    message: Spoken
    finish_reason: FinishReason | Literal["tool_calls"]


class TextChoice(Choice):
    """An answer of a completion."""

    text: str
    finish_reason: FinishReason


class Completed(Shape):
    """Fields shared by the responses of OpenAI's two completion endpoints. `created`: seconds since the epoch."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Completed):
    """Response of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Completed):
    """Response of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Generated(Shape):
    """Response of /generate."""

    response: str
    id: str
    model: str
    usage: Usage


class Embedding(Shape):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class TextUsage(Shape):
    """Token counts of texts that are only read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Shape):
    """Response of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: TextUsage


class Health(Shape):
    """Response of /livez, /readyz and /health."""

    status: Literal["alive", "ready"]


class DrainState(Shape):
    """Response of /drainz. `in_flight`: number of unfinished answers."""

    status: Literal["serving", "draining"]
    in_flight: int
