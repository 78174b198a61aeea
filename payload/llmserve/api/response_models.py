"""Answers as clients get them, for the OpenAPI document. `answers` writes them by hand, and a test compares."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmserve.protocol import FinishReason


class Shape(BaseModel):
    """Nothing but what is listed."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Usage(Shape):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Spoken(Shape):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    """The one answer of a chat."""

    index: Literal[0]
    message: Spoken
    logprobs: None
    finish_reason: FinishReason


class TextChoice(Shape):
    """The one answer to a prompt."""

    index: Literal[0]
    text: str
    logprobs: None
    finish_reason: FinishReason


class Completed(Shape):
    """What both of OpenAI's endpoints say of an answer. `created` in seconds since the epoch."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Completed):
    """Answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Completed):
    """Answer of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Generated(Shape):
    """Answer of /generate."""

    response: str
    model: str
    usage: Usage


class Embedding(Shape):
    """One vector: numbers, or base64 of float32 with the lowest byte first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class TextUsage(Shape):
    """Tokens of texts that are only read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Shape):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: TextUsage


class Health(Shape):
    """Answer of /livez, /readyz and /health."""

    status: Literal["alive", "ready"]


class DrainState(Shape):
    """Answer of /drainz. `in_flight`: answers that this gateway still owes."""

    status: Literal["serving", "draining"]
    in_flight: int
