"""Parsed and validated requests; recent ones are memoized for identical bodies.

A memoized request is only content, never a permission: authentication, policy, quotas and audit apply as to any other. Tenants
share none, so that response times do not reveal what other tenants send. Only greedy requests are memoized: their answers are in
the cache anyway, so no prompt stays in memory that would not be stored elsewhere.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pydantic_core import to_json

from llmserve.api.errors import ApiError
from llmserve.api.requests import (
    Call,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerateBody,
    chat_call,
    completion_call,
    embedding_call,
    generate_call,
    parse_body,
    parse_query,
)
from llmserve.api.responses_api_body import ResponsesBody
from llmserve.api.responses_api_request import responses_call
from llmserve.asgi import Receive, Scope, header
from llmserve.cache.exact import cache_key
from llmserve.documents.grounding import Grounding
from llmserve.protocol import Generate, Hello

# Requests. Together with KEPT_BYTES: at most 1 MiB of bodies, and a few times as much of parsed objects.
KEPT = 256
KEPT_BYTES = 4096  # per memoized request; parsing is a small part of the cost of a longer one
BYTES_A_TOKEN = 3  # to estimate a prompt's tokens before the engine counts them; English has four
Read = Callable[[bytes, int], Call]  # of a body or query, and the answer's length that the policy grants


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body, already limited by the middleware. The time that the client takes to send it is not overhead."""
    before = time.monotonic()
    message = await receive()
    parts = [message.get("body", b"")]
    while message.get("more_body", False):
        message = await receive()
        parts.append(message.get("body", b""))
    scope["llm"].waited += time.monotonic() - before
    return b"".join(parts)


def seconds_allowed(scope: Scope, limit: float) -> float:
    """Time limit of this answer: `x-llm-deadline-ms` if the client sends it, at most `limit`; raises ApiError 400."""
    requested = header(scope, b"x-llm-deadline-ms")
    if requested is None:
        return limit
    if not re.fullmatch(rb"[1-9][0-9]{0,8}", requested):
        name = "x-llm-deadline-ms"
        value = requested[:20].decode("latin-1")
        message = f"the header '{name}' is {value!r}: send milliseconds as a positive integer"
        raise ApiError(400, "invalid_value", message, name)
    return min(limit, int(requested) / 1000)


def chat(body: bytes, granted: int) -> Call:
    """POST /v1/chat/completions; raises ApiError 400, as do the others."""
    return chat_call(parse_body(ChatBody, body), granted)


def completion(body: bytes, granted: int) -> Call:
    """POST /v1/completions."""
    return completion_call(parse_body(CompletionBody, body), granted)


def responses(body: bytes, granted: int) -> Call:
    """POST /v1/responses."""
    return responses_call(parse_body(ResponsesBody, body), granted)


def posted(body: bytes, granted: int) -> Call:
    """POST /generate."""
    return generate_call(parse_body(GenerateBody, body), granted)


def queried(query: bytes, granted: int) -> Call:
    """GET /generate."""
    return generate_call(parse_query(query), granted)


def embedding(body: bytes, _: int) -> Call:
    """POST /v1/embeddings."""
    return embedding_call(parse_body(EmbeddingBody, body))


def content_of(generate: Generate) -> object:
    """The prompt, messages or inputs."""
    if generate.prompt is not None:
        return generate.prompt
    return generate.messages if generate.inputs is None else generate.inputs


def text_of(generate: Generate) -> str:
    """The same as one text, from which the audit record's hash is computed."""
    content = content_of(generate)
    return content if isinstance(content, str) else to_json(content).decode()


@dataclass(slots=True)
class ParsedRequest:
    """A parsed request. Identical requests share it, so `call` must not be changed.

    `text`: its content as one text. `proof`: the audit record's hash of what the client sent.
    `secret`: for names in the cache. `sent`: the client's own request, if passages were added to it.
    """

    call: Call
    text: str
    proof: str
    secret: bytes = field(repr=False)
    original: Generate | None = field(default=None, repr=False)
    keyed: tuple[tuple[str, int, Hello], str] | None = field(default=None, repr=False)

    @property
    def content(self) -> object:
        """The prompt, messages or inputs of the client, for the audit record."""
        return content_of(self.original or self.call.generate)

    def grounded(self, grounding: Grounding) -> "ParsedRequest":
        """The request with passages, and with a grammar that only allows citations of them."""
        generate = self.call.generate
        request = replace(
            generate,
            messages=grounding.messages(generate.messages or ()),
            extra=generate.extra | {"structured_outputs": grounding.grammar},
        )
        call = replace(self.call, generate=request)
        return ParsedRequest(call, text_of(request), self.proof, self.secret, original=generate)

    def key(self, tenant: str, revision: int, hello: Hello) -> str:
        """Its name in the cache; `revision` is that of the policy."""
        depends = tenant, revision, hello
        if self.keyed is None or self.keyed[0] != depends:
            self.keyed = depends, cache_key(self.secret, *depends, self.call.generate)
        return self.keyed[1]


class ParsedRequests:
    """The most recent requests of this process."""

    def __init__(self, proof: Callable[[str], str], secret: bytes) -> None:
        """`proof` computes the audit record's hash of a text. `secret`: for names in the cache."""
        self.proof = proof
        self.secret = secret
        self.cache: dict[tuple[str, Read, int, bytes], ParsedRequest] = {}

    def read(self, tenant: str, read: Read, granted: int, body: bytes) -> ParsedRequest:
        """Parse `body`; raises ApiError 400. `granted`: tokens of an answer, by the policy."""
        key = tenant, read, granted, body
        parsed = self.cache.get(key)
        if parsed is None:
            call = read(body, granted)
            text = text_of(call.generate)
            parsed = ParsedRequest(call, text, self.proof(text), self.secret)
            if len(body) <= KEPT_BYTES and call.generate.temperature == 0:
                if len(self.cache) >= KEPT:
                    del self.cache[next(iter(self.cache))]  # the oldest
                self.cache[key] = parsed
        return parsed
