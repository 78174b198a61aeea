"""The response object of the Responses API for the OpenAPI document. `responses_api_answer` builds it, and a test compares."""

from typing import Any, Literal

from llmserve.api.response_models import Shape


class OutputText(Shape):
    """The text of a message. `logprobs`: as in chat completions, if the request includes them."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[dict[str, Any]]


class OutputMessage(Shape):
    """A message of the model."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(Shape):
    """The call of a function. `arguments`: JSON as text."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class OutputReasoningText(Shape):
    """The text of a reasoning item."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(Shape):
    """The reasoning behind the answer."""

    type: Literal["reasoning"]
    id: str
    summary: list[None]
    content: list[OutputReasoningText]
    status: Literal["completed", "incomplete"]


class IncompleteDetails(Shape):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens", "content_filter"]


class InputTokensDetails(Shape):
    """Input tokens that the engine had in its cache, or added to it."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Shape):
    """Output tokens that are reasoning."""

    reasoning_tokens: int


class ResponseUsage(Shape):
    """Token counts in the Responses API's format; the details are 0 if the engine gives none."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(Shape):
    """Response of POST /v1/responses. `created_at`: seconds since the epoch. No response is stored. The fields without a type
    here are those of the request.
    """

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: Any
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage
