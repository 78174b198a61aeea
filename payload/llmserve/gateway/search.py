"""Passages of the organization's documents for callers who may read them: POST /v1/search, and answers from documents."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmserve.access.decision import Decision
from llmserve.api.errors import ApiError
from llmserve.api.requests import Call, Collections, Strict, beyond, parse_body, whole
from llmserve.api.response_models import Shape
from llmserve.asgi import Exchange, Receive, Scope, Send, json_body, respond
from llmserve.documents.grounding import OWN_ANSWERS, Grounding, question, room
from llmserve.documents.passages import language
from llmserve.documents.retrieval import Hit, Retrieval, SearchResult
from llmserve.gateway.answer_source import AnswerSource
from llmserve.gateway.parsed_requests import BYTES_A_TOKEN, read_body, seconds_allowed
from llmserve.gateway.state import State
from llmserve.protocol import Done, Generate, Hello
from llmserve.settings import Documents
from llmserve.upstream.admission import Place
from llmserve.upstream.instances import RoutedRequest

LEAST_SIMILARITY = 0.0  # with a model that states none
QUERY_LETTERS = 1000  # a passage has 800; of a longer question the end is looked for


class SearchBody(Strict):
    """Body of POST /v1/search."""

    query: Annotated[str, Field(min_length=1, max_length=QUERY_LETTERS)]
    collections: Collections
    size: Annotated[int, Field(ge=1, le=50), BeforeValidator(whole)] = 8


class MatchedPassage(Shape):
    """A passage. `page` counts from 1; `start`, `end`: characters of the document's text; `hash`: SHA-256 of the passage,
    `revision`: of the document; `score`: comparable within one response.
    """

    id: str
    score: float
    collection: str
    document: str
    name: str
    page: int
    start: int
    end: int
    hash: str
    revision: str
    text: str


class Passages(Shape):
    """Response of POST /v1/search, the best passage first."""

    object: Literal["list"]
    data: list[MatchedPassage]


def readable_collections(collections: Iterable[str], decision: Decision) -> frozenset[str]:
    """The collections of a request; raises ApiError 404. One that the caller may not read looks like one that does not exist."""
    names = frozenset(collections)
    for name in sorted(names - decision.collections):
        listed = ", ".join(f"'{each}'" for each in sorted(decision.collections)) or "none"
        message = f"there is no collection '{name}': you may read {listed}"
        raise ApiError(404, "collection_not_found", message, "collections")
    return names


def on_record(names: Iterable[str], hits: Sequence[Hit]) -> dict[str, object]:
    """The audit record's fields about passages: ids, hashes and revisions, never text or names."""
    return {
        "llmkeep.documents.collections": sorted(names),
        "llmkeep.documents.passages": [hit.id for hit in hits],
        "llmkeep.documents.hashes": [hit.hash for hit in hits],
        "llmkeep.documents.revisions": sorted({f"{hit.document}:{hit.revision}" for hit in hits}),
    }


def least_similarity(settings: Documents, hello: Hello, query: str) -> float:
    """The minimum cosine of the nearest passage for the documents to answer the query: the operator's setting, else the
    model's."""
    if settings.least_similarity is not None:
        return settings.least_similarity
    return hello.least_similarity.get(language(query), LEAST_SIMILARITY)


class Search:
    """The endpoint, the search, and the embedding of its query by an engine."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/search; raises ApiError 400, 404, 429 or 503."""
        exchange: Exchange = scope["llm"]
        body = parse_body(SearchBody, await read_body(scope, receive))
        beyond(body)
        documents, names = self.permitted(exchange, body.collections)
        proof = self.state.recorder.proof(body.query)
        about = on_record(names, ())
        await self.state.recorder.intent(exchange, documents.settings.model, body.query, proof, about)
        result, _ = await self.results(scope, documents, names, body.query, body.size)
        exchange.recorded |= on_record(names, result.hits)
        await respond(send, 200, json_body({"object": "list", "data": [asdict(hit) for hit in result.hits]}))

    async def grounding(
        self, scope: Scope, call: Call, routed: RoutedRequest
    ) -> tuple[Grounding, dict[str, object]]:
        """The passages for answering a chat, and the audit record's fields about them; raises ApiError 400, 404, 429 or 503."""
        exchange: Exchange = scope["llm"]
        documents, names = self.permitted(exchange, call.collections)
        if "structured_outputs" not in routed.hello.fields:
            message = f"'{routed.model}' cannot answer from documents, as its engine supports no grammars: choose another model"
            raise ApiError(400, "unsupported_field", message, "collections")
        if own := [name for name in OWN_ANSWERS if name in call.generate.extra]:
            message = f"'{own[0]}' cannot be combined with 'collections', which determines the form of the answer: leave one out"
            raise ApiError(400, "invalid_value", message, own[0])
        query = question(call.generate.messages or ())
        result, least = await self.results(
            scope, documents, names, query[-QUERY_LETTERS:], len(call.collections) * 8
        )
        near = result.similarity is None or result.similarity >= least
        # Half of the context is the conversation's and the answer's.
        hits = room(result.hits, routed.hello.context // 2) if near else []
        return Grounding(hits, query), on_record(names, hits)

    def permitted(self, exchange: Exchange, collections: Iterable[str]) -> tuple[Retrieval, frozenset[str]]:
        """The index and the collections to search; raises ApiError 404."""
        if exchange.decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        names = readable_collections(collections, exchange.decision)
        if self.state.documents is None:
            message = "this gateway has no documents: ask its operator"
            raise ApiError(404, "collection_not_found", message, "collections")
        return self.state.documents, names

    async def results(
        self, scope: Scope, documents: Retrieval, names: frozenset[str], query: str, size: int
    ) -> tuple[SearchResult, float]:
        """The passages of the caller's tenant, and the least similarity of an answer; raises ApiError 429 or 503."""
        exchange: Exchange = scope["llm"]
        if exchange.identity is None:
            raise RuntimeError("this route must be behind authentication and policy")
        vector, hello = await self.vector(scope, documents, query)
        least = least_similarity(documents.settings, hello, query)
        before = time.monotonic()
        try:
            tenant = exchange.identity.tenant
            return await documents.search(tenant, names, query, vector, hello.revision, size), least
        finally:
            exchange.waited += time.monotonic() - before

    async def vector(self, scope: Scope, documents: Retrieval, query: str) -> tuple[list[float], Hello]:
        """The query's vector and its model; its tokens count against the caller's quota. Raises ApiError."""
        exchange: Exchange = scope["llm"]
        identity, decision = exchange.identity, exchange.decision
        if identity is None or decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        generate = Generate(0, False, 0, inputs=[query])
        routed = self.state.instances[documents.settings.model].route(identity.tenant, generate)
        generate.inputs = [routed.hello.prompts.get("query", "") + query]
        tokens = max(1, len(query.encode()) // BYTES_A_TOKEN)
        seconds = seconds_allowed(scope, self.state.limits.answer_seconds)
        place = Place(
            self.state.limits.queue_seconds,
            tokens,
            decision.rate.priority,
            exchange.started + seconds,
            seconds,
            identity.tenant,
            identity.subject,
            decision.weight,
        )
        reserved = await self.state.quotas.reserve(identity.tenant, identity.subject, decision, tokens, 0, 1)
        source = AnswerSource(exchange, routed, generate, lambda: place, self.state.metrics, tokens)
        try:
            frame = await source.begin()
        finally:
            source.close()
            reserved.settle(sum(source.usage), 0)
        if not isinstance(frame, Done):
            raise RuntimeError("a piece of a stream in an answer that is not streamed")
        vector: list[float] = json.loads(frame.text)[0]["embedding"]
        return vector, routed.hello
