"""The protocol between gateway and engine: one JSON object per line over a UNIX socket.

The engine opens with `Hello`. Requests share a connection and are identified by `id`, which the gateway chooses. Each
request ends with exactly one `Done` or `Failed`; a stream has `Delta`s before it. After `Cancel` the engine frees the
request's slot within one step and sends nothing more for it. The engine reports its state in a `Beat` every second. A
stopping engine announces it in a `Beat`, and exits once the gateways have closed their connections.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llmserve.fast_json import parse, serialize

LINE_LIMIT = 64 * 1024 * 1024  # bytes; JSON escapes can inflate a body of the maximum size sixfold
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class Hello:
    """The engine's description of itself.

    `context`: in tokens. `slots`: maximum number of concurrent requests. `tokens`: maximum number of prompt and
    answer tokens in all slots together; 0 means that only `slots` is a limit. `template`: revision of the chat
    template, where `revision` does not cover it. `fields`: those of `llmserve.fields.PASSED` that it supports; the
    gateway rejects the others by name. `dimensions`: length of its embedding vectors; 0 for a text model. `kept`: its
    answers are plain text, so they may be cached. `adapters`: names of its adapters, each with the revision of model
    and adapter together. `parent`: the base model, if `model` is an adapter. `template_arguments`: names that
    `chat_template_kwargs` may have. `prompts`: the text that an embedding model needs before a text, by purpose: "query",
    "document". `least_similarity`: by a question's language, the cosine below which its nearest passage does not answer it.
    """

    model: str
    revision: str
    driver: str
    context: int
    slots: int
    fields: list[str] = field(default_factory=list)
    dimensions: int = 0
    tokens: int = 0
    template: str = ""
    kept: bool = True
    adapters: dict[str, str] = field(default_factory=dict)
    parent: str = ""
    template_arguments: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    least_similarity: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Generate:
    """One request. `messages` go through the chat template; `prompt` is used verbatim.

    If both are set, a model without a chat template uses the prompt. `clip`: the client has set no length, so `max_tokens`
    is the policy's limit, and the engine lowers it to what the context has left. `length_field`: the client's name of
    `max_tokens`, for messages. `temperature` 0 means greedy, None the engine's configured value;
    likewise `top_p`. `extra`: the client's fields that only some engines support, unchanged. `deadline`: seconds
    until the answer is useless; a duration, so that the clocks need not agree. `traceparent`: as in W3C Trace
    Context, for the engine's logs and its own requests. `adapter`: a name from `Hello.adapters`; "" is the base
    model.

    `inputs`: texts to embed, in place of a prompt. The text of `Done` is then the `data` list of OpenAI's API as
    JSON, with the vectors in `encoding`, so that the gateway can pass it through.
    """

    id: int
    stream: bool
    max_tokens: int
    clip: bool = False
    length_field: str = "max_tokens"
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] | None = None
    encoding: Literal["float", "base64"] = "float"
    deadline: float | None = None
    traceparent: str | None = None
    adapter: str = ""

    @property
    def answers(self) -> int:
        """Number of answers that the engine computes."""
        return int(max(self.extra.get("n", 1), self.extra.get("best_of", 1)))


@dataclass(slots=True)
class Cancel:
    """The client of request `id` has disconnected."""

    id: int


@dataclass(slots=True)
class Delta:
    """A piece of the answer's text."""

    id: int
    text: str


@dataclass(slots=True)
class Choices(Delta):
    """A piece of several answers, or of one that is more than text. `choices`: those of OpenAI's chunk. `text`: of the first."""

    choices: list[dict[str, Any]]


@dataclass(slots=True)
class Event(Delta):
    """A server-sent event of an upstream, passed through unchanged; exists only in the gateway, never on the socket.

    `text`: the text of its first choice. `usage`: it carries the usage and nothing else.
    """

    data: bytes
    usage: bool = False


@dataclass(slots=True)
class Done:
    """The end of an answer; `text` is the whole answer, or empty if it was streamed.

    `choices`: as in `Choices`, of an answer that was not streamed. `passed`: the whole answer as the upstream's JSON, for clients
    of the same API.
    """

    id: int
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    choices: list[dict[str, Any]] | None = None
    passed: str | None = None


@dataclass(slots=True)
class Failed:
    """The request failed, possibly after part of a stream. `status` and `code` as in errors.ApiError."""

    id: int
    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(slots=True)
class Beat:
    """The engine's state, sent every second. `stalled`: work is pending and the model has made no step for too long.

    `kv_used`: used share of the KV cache, 0 to 1, if the driver knows it. `gpu_used`: utilization of each GPU, 0 to
    1. `leaving`: the engine is stopping: it finishes its requests, accepts no new ones, and is expected back. This is
    a field rather than a frame because gateways of earlier releases ignore unknown fields but not unknown frames.
    `requests`: running and waiting, of all gateways.
    """

    stalled: bool
    kv_used: float | None = None
    gpu_used: list[float] = field(default_factory=list)
    leaving: bool = False
    requests: int = 0


Frame = Beat | Hello | Generate | Cancel | Delta | Choices | Done | Failed
KINDS: dict[str, type[Any]] = {
    "beat": Beat,
    "hello": Hello,
    "generate": Generate,
    "cancel": Cancel,
    "delta": Delta,
    "choices": Choices,
    "done": Done,
    "failed": Failed,
}
NAMES = {kind: name for name, kind in KINDS.items()}
FIELDS = {
    kind: [each.name for each in fields(kind)] for kind in NAMES
}  # dataclasses.asdict() would copy every message
KNOWN = {kind: frozenset(names) for kind, names in FIELDS.items()}


class ProtocolError(Exception):
    """The peer sent a line that is not a frame."""


def encode(frame: Frame) -> bytes:
    if type(frame) is Delta:  # one per token, so worth a fast path
        return b'{"kind":"delta","id":%d,"text":%b}\n' % (frame.id, serialize(frame.text))
    content = {"kind": NAMES[type(frame)]}
    for name in FIELDS[type(frame)]:
        content[name] = getattr(frame, name)
    return serialize(content) + b"\n"


def decode(line: bytes) -> Frame:
    """Parse one line; raises ProtocolError.

    Unknown fields are dropped: during an upgrade, gateways and engines of two releases run side by side.
    """
    try:
        content = parse(line)
        kind = KINDS[content.pop("kind")]
        if not content.keys() <= KNOWN[kind]:
            content = {name: content[name] for name in content.keys() & KNOWN[kind]}
        frame: Frame = kind(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"a line of {len(line)} bytes is not a frame ({type(error).__name__})") from error
    return frame
