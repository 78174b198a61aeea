"""Retrieves passages for a caller from Elasticsearch: both searches in one request, both limited to the caller's tenant and
collections."""

import asyncio
import base64
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llmserve.api.errors import ApiError, unavailable
from llmserve.documents.index import by_vector, by_words, fused, index_name
from llmserve.documents.passages import Language, language
from llmserve.fast_json import parse, serialize
from llmserve.http_client import BadAnswer, HttpClient, Lost
from llmserve.settings import Documents

log = logging.getLogger("llmserve.documents")
ANSWER_BYTES = 8 * 1024 * 1024
# Pauses before a search is repeated during which the index was replaced: shares of the deadline, half of it in all.
PAUSES = (0.01, 0.04, 0.15, 0.3)


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that answers a query. `id`: of the passage; `score`: by rank fusion, comparable within one answer only."""

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


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best passages, and the cosine similarity of the nearest one to the query: -1 without any, None if the index has another
    model's vectors.
    """

    hits: list[Hit]
    similarity: float | None


class ForeignPassage(Exception):
    """The index returned a passage that its filter excludes."""


def ranked(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The hits of one search, best first, ties by id; none if no document was ever added. Raises KeyError, TypeError or
    ValueError if the answer is incomplete.
    """
    if answer["status"] == 404 and answer["error"]["type"] == "index_not_found_exception":
        return []
    if answer["status"] != 200 or answer["timed_out"] or answer["_shards"]["failed"]:
        raise ValueError("a search did not reach all shards")
    hits: list[dict[str, Any]] = answer["hits"]["hits"]
    return sorted(hits, key=lambda hit: (-hit["_score"], hit["_id"]))


def complete(answer: dict[str, Any], alias: str) -> bool:
    """Whether repeating the search would change nothing: all shards were searched, the query does not fit the index, or no
    document was ever added. While the alias is switched to another index, the old one's shards, or the index itself, are missing.
    """
    if answer["status"] == 404:
        return bool(
            answer["error"]["type"] == "index_not_found_exception" and answer["error"]["index"] == alias
        )
    return answer["status"] == 400 or (answer["status"] == 200 and not answer["_shards"]["failed"])


def nearest(answer: dict[str, Any], index: str) -> list[dict[str, Any]] | None:
    """The hits by vector; None if the index belongs to another model, whose vectors cannot be compared with the query's."""
    if answer["status"] == 400 and "number of dimensions" in str(answer["error"]):
        return None
    hits = ranked(answer)
    return hits if all(hit["_index"] == index for hit in hits) else None


def result(
    answers: Sequence[dict[str, Any]],
    tenant: str,
    collections: Collection[str],
    size: int,
    index: str,
    asked_in: Language,
) -> SearchResult:
    """The best hits of both searches, the second of which is by vector; only those of the first if the vectors are not those of
    `index`. Raises ForeignPassage, so that a fault of the index never reveals another tenant's text.
    """
    near = nearest(answers[1], index)
    rankings = [ranked(answers[0]), near or []]
    sources = {hit["_id"]: hit["_source"] for ranking in rankings for hit in ranking}
    for source in sources.values():
        if source.pop("tenant") != tenant or source["collection"] not in collections:
            raise ForeignPassage
    best = fused([[hit["_id"] for hit in ranking] for ranking in rankings], asked_in)[:size]
    # Elasticsearch's score is (1 + cosine) / 2.
    similarity = near[0]["_score"] * 2 - 1 if near else -1.0
    hits = [Hit(id=name, score=score, **sources[name]) for name, score in best]
    return SearchResult(hits, None if near is None else similarity)


def away() -> ApiError:
    """A 503 that says that documents were not searched, rather than that there are none."""
    return unavailable(
        "documents_unavailable", "the documents cannot be searched now: retry later", retry_after=5
    )


class Retrieval:
    """The gateway's client of the index."""

    def __init__(self, settings: Documents, key: str | None) -> None:
        """`key`: ID:SECRET of an Elasticsearch API key that may only read this index."""
        self.settings = settings
        self.http = HttpClient(settings.url, settings.tls, None)
        self.headers = {"authorization": f"ApiKey {base64.b64encode(key.encode()).decode()}"} if key else {}

    async def answers(self, body: bytes) -> list[dict[str, Any]]:
        """The response to the searches in BODY. Raises OSError, Lost, BadAnswer or ValueError."""
        path = f"/{self.settings.index}/_msearch"
        async with self.http.request("POST", path, body, self.headers) as response:
            content = await response.whole(ANSWER_BYTES)
        if response.status != 200:
            raise ValueError(f"it returned {response.status}")
        answers: list[dict[str, Any]] = parse(content)["responses"]
        return answers

    async def complete_answers(self, body: bytes) -> list[dict[str, Any]]:
        """The response to the searches in BODY, which are repeated until all shards were searched; raises as `answers` does."""
        for pause in (*PAUSES, None):
            answers = await self.answers(body)
            if all(complete(answer, self.settings.index) for answer in answers):
                return answers
            if pause is not None:
                await asyncio.sleep(pause * self.settings.deadline_ms / 1000)
        raise ValueError(f"a search did not reach all shards in {len(PAUSES) + 1} tries")

    async def search(
        self,
        tenant: str,
        collections: Collection[str],
        query: str,
        vector: Sequence[float],
        model_revision: str,
        size: int,
    ) -> SearchResult:
        """The best passages of these collections, which the policy lets the caller read; raises ApiError 503. `model_revision`:
        the revision of the model that produced the vector.
        """
        index = index_name(self.settings.index, len(vector), model_revision)
        searches = by_words(tenant, collections, query), by_vector(tenant, collections, vector)
        body = b"".join(b"{}\n" + serialize(search) + b"\n" for search in searches)
        try:
            async with asyncio.timeout(self.settings.deadline_ms / 1000):
                answers = await self.complete_answers(body)
            answer = result(answers, tenant, collections, size, index, language(query))
            if answer.similarity is None:
                log.warning(
                    "passages are found by words alone, because the index belongs to another model: run `llm-serve documents "
                    "reindex`"
                )
            return answer
        except ForeignPassage:
            log.critical(
                "the index returned a passage of another tenant or collection; none of it was passed on"
            )
            raise away() from None
        except (OSError, TimeoutError, Lost, BadAnswer, ValueError, KeyError, TypeError) as error:
            log.error(
                "documents were not searched",
                extra={"fields": {"error": type(error).__name__, "reason": str(error)[:200]}},
            )
            raise away() from None
