"""What gateway and engine say to each other over a UNIX socket: one JSON object a line.

The engine opens with `Hello`. Many requests share a connection, told apart by `id`, chosen by the gateway. A
request ends with exactly one `Done` or `Failed`; `Delta`s come before it if it asked for a stream. After
`Cancel` the engine frees the request's slot within a step and sends nothing more for it. Once a second the engine says
how it is, by `Beat`; one that is told to stop says goodbye by it, and ends when the gateways have hung up.
"""

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

LINE_LIMIT = 64 * 1024 * 1024  # bytes; JSON escapes may multiply a body of the largest size by six
FinishReason = Literal["stop", "length"]
# Fields that only some engines know, each with the value that asks for nothing. Any other value goes to an engine that
# has declared the field, and is refused by name where it has not.
NEUTRAL: dict[str, object] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": None,
    "functions": None,
    "logit_bias": None,
    "logprobs": False,
    "metadata": None,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": None,
    "presence_penalty": 0,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "service_tier": None,
    "store": False,
    "suffix": None,
    "tool_choice": None,
    "tools": None,
    "top_logprobs": None,
    "user": None,
}
OPTIONAL = frozenset({"seed", *NEUTRAL})  # all that an engine can declare in its Hello


@dataclass(frozen=True, slots=True)
class Hello:
    """Who the engine is. `context` in tokens; `slots`: how many requests it runs at once.

    `tokens`: how many it holds at once in all of them, prompts and answers; 0 means that only `slots` is a bound.
    `template`: revision of the chat template, where `revision` does not cover it. `fields`: those of `OPTIONAL` that
    it honours; the gateway refuses the others by name. `dimensions`: length of its vectors; 0 for a model that makes
    text. `kept`: its answers are text and nothing else, so they may come from the cache. `adapters`: names under which it
    answers otherwise, each with the revision that stands for both; `parent`: the model to which `model` is an adapter.
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


@dataclass(slots=True)
class Generate:
    """One request: `messages` go through the chat template, `prompt` is taken as it is.

    If both are set, a model without a chat template takes the prompt. `clip`: `max_tokens` is only a default,
    the engine takes less where the context holds less. `temperature` 0 means greedy, None what the engine is
    configured for; `top_p` likewise. `extra` has the client's fields that only some engines know, as they came.
    `deadline`: seconds after which nobody wants the answer any more; seconds and not a time, so that no clock matters.
    `traceparent` as the W3C has it, for what the engine asks or logs. `adapter`: one of the Hello's; "" is the model itself.

    `inputs`: texts whose vectors are wanted, instead of an answer. What is said is then OpenAI's list `data` as JSON,
    with the vectors in `encoding`, so that the gateway passes it on as it is.
    """

    id: int
    stream: bool
    max_tokens: int
    clip: bool = False
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


@dataclass(slots=True)
class Cancel:
    """The client of request `id` has left."""

    id: int


@dataclass(slots=True)
class Delta:
    """A piece of the answer's text."""

    id: int
    text: str


@dataclass(slots=True)
class Event(Delta):
    """A server-sent event of an upstream, to be passed on as it came; in the gateway only, never on the socket.

    `text` is what it says of the first choice. `usage`: it carries the usage and nothing else.
    """

    data: bytes
    usage: bool = False


@dataclass(slots=True)
class Done:
    """The end of an answer; `text` is the whole of it if the request was no stream, else empty.

    `passed`: the whole answer as an upstream's JSON, for clients of the API that it speaks.
    """

    id: int
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    passed: str | None = None


@dataclass(slots=True)
class Failed:
    """No answer, or no rest of it. `status` and `code` as in errors.ApiError."""

    id: int
    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(slots=True)
class Beat:
    """How the engine is. `stalled`: work is pending and the model has made no step for too long.

    `kv_used`: share of the cache for keys and values, 0 to 1, where the driver knows it; `gpu_used`: of each GPU,
    where there are some. `leaving`: it was told to stop: it ends what it has, takes nothing more, and is expected back. A
    field and no frame of its own, since a gateway of a former release passes over the one and not over the other.
    """

    stalled: bool
    kv_used: float | None = None
    gpu_used: list[float] = field(default_factory=list)
    leaving: bool = False


Frame = Beat | Hello | Generate | Cancel | Delta | Done | Failed
KINDS: dict[str, type[Any]] = {
    "beat": Beat,
    "hello": Hello,
    "generate": Generate,
    "cancel": Cancel,
    "delta": Delta,
    "done": Done,
    "failed": Failed,
}
NAMES = {kind: name for name, kind in KINDS.items()}
FIELDS = {kind: [each.name for each in fields(kind)] for kind in NAMES}  # asdict() would copy every message
KNOWN = {kind: frozenset(names) for kind, names in FIELDS.items()}


class ProtocolError(Exception):
    """The other side said something that is no frame."""


def encode(frame: Frame) -> bytes:
    """The frame as one line."""
    if type(frame) is Delta:  # the frame of every token: do not go through asdict
        text = json.dumps(frame.text)
        return b'{"kind":"delta","id":%d,"text":%s}\n' % (frame.id, text.encode())
    content = {"kind": NAMES[type(frame)]}
    for name in FIELDS[type(frame)]:
        content[name] = getattr(frame, name)
    return json.dumps(content).encode() + b"\n"


def decode(line: bytes) -> Frame:
    """The frame in one line; raises ProtocolError.

    What a field of a newer release says is left out: an upgrade has gateways and engines of two releases side by side.
    """
    try:
        content = json.loads(line)
        kind = KINDS[content.pop("kind")]
        if not content.keys() <= KNOWN[kind]:
            content = {name: content[name] for name in content.keys() & KNOWN[kind]}
        frame: Frame = kind(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"a line of {len(line)} bytes is no frame ({type(error).__name__})") from error
    return frame
