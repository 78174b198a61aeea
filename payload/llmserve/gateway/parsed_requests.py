"""Questions as clients have sent them, read and checked; a few are kept, for those who ask the same again.

What is kept says what was asked, and nothing of who may: a question that is known by its bytes passes key, policy, quotas
and record as any other. Tenants share none, so that nobody can tell by the time it takes what others ask. Only greedy
questions are kept: the answers to these lie in the cache, so no prompt stays in memory that would not stay elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic_core import to_json

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
from llmserve.cache.exact import CacheKey, cache_key
from llmserve.protocol import Generate, Hello
from llmserve.settings import Limits

# Questions; with the next number, at most 1 MiB of bytes, and a few times as much of what was read.
KEPT = 256
KEPT_BYTES = 4096  # of a question that is kept; reading a longer one is little of what it costs
Read = Callable[[bytes, Limits], Call]


def chat(body: bytes, limits: Limits) -> Call:
    """Of POST /v1/chat/completions; raises ApiError 400, as the others do."""
    return chat_call(parse_body(ChatBody, body), limits)


def completion(body: bytes, limits: Limits) -> Call:
    """Of POST /v1/completions."""
    return completion_call(parse_body(CompletionBody, body), limits)


def posted(body: bytes, limits: Limits) -> Call:
    """Of POST /generate."""
    return generate_call(parse_body(GenerateBody, body), limits)


def queried(query: bytes, limits: Limits) -> Call:
    """Of GET /generate."""
    return generate_call(parse_query(query), limits)


def embedding(body: bytes, _: Limits) -> Call:
    """Of POST /v1/embeddings."""
    return embedding_call(parse_body(EmbeddingBody, body))


def asked_text(generate: Generate) -> str:
    """What was asked, as one text, for the audit record."""
    if generate.prompt is not None:
        return generate.prompt
    asked = generate.messages if generate.inputs is None else generate.inputs
    return to_json(asked).decode()


@dataclass(slots=True)
class ParsedRequest:
    """All who ask it share it, so nobody changes `call`. `text` is what was asked, `proof` the record's hash of it."""

    call: Call
    text: str
    proof: str
    keyed: tuple[tuple[str, int, Hello], CacheKey] | None = field(default=None, repr=False)

    def key(self, tenant: str, revision: int, hello: Hello) -> CacheKey:
        """Its key in the cache; `revision` is the policy's."""
        depends = tenant, revision, hello
        if self.keyed is None or self.keyed[0] != depends:
            self.keyed = depends, cache_key(*depends, self.call.generate)
        return self.keyed[1]


class ParsedRequests:
    """The last ones of one process."""

    def __init__(self, proof: Callable[[str], str]) -> None:
        """None yet. `proof` makes the record's hash of a text."""
        self.proof = proof
        self.kept: dict[tuple[str, Read, int, bytes], ParsedRequest] = {}

    def read(self, tenant: str, read: Read, limits: Limits, sent: bytes) -> ParsedRequest:
        """What `sent` asks for within `limits`, which differ by their `max_tokens` only; raises ApiError 400."""
        key = tenant, read, limits.max_tokens, sent
        parsed = self.kept.get(key)
        if parsed is None:
            call = read(sent, limits)
            text = asked_text(call.generate)
            parsed = ParsedRequest(call, text, self.proof(text))
            if len(sent) <= KEPT_BYTES and call.generate.temperature == 0:
                if len(self.kept) >= KEPT:
                    del self.kept[next(iter(self.kept))]  # the oldest
                self.kept[key] = parsed
        return parsed
