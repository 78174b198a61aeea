"""The index of passages: its mapping and its queries. Every query is limited to a tenant and collections."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any

from llmserve.documents.passages import Language, Passage

CANDIDATES = 50  # of each search, before both are fused
EXAMINED = 10 * CANDIDATES  # by kNN, on each shard; fewer make it approximate
# The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009), and the weight of words where vectors have
# 1, by the question's language: better than 60 and 1 on the half of questions to tune on in bench/serving/retrieval.py, with both
# models of artifacts.yml.
FUSION: dict[Language, tuple[int, float]] = {"en": (60, 0.3), "zh": (1, 1.0)}
KEYWORD: dict[str, Any] = {"type": "keyword"}
STORED: dict[str, Any] = {"type": "keyword", "index": False, "doc_values": False}
NUMBER: dict[str, Any] = {"type": "integer", "index": False}
ANALYZED = {
    "type": "text",
    "analyzer": "english",
    "fields": {"cjk": {"type": "text", "analyzer": "cjk"}},  # bigrams of Chinese, Japanese and Korean
}
SHOWN = ["tenant", "collection", "document", "name", "page", "start", "end", "hash", "revision", "text"]


def mapping(dimensions: int) -> dict[str, Any]:
    """Settings and mapping of an index whose vectors have `dimensions` dimensions. Fields that are not listed here are
    refused."""
    return {
        "settings": {"number_of_shards": 1, "number_of_replicas": 0},
        "mappings": {
            "dynamic": "strict",
            "properties": {
                "tenant": KEYWORD,
                "collection": KEYWORD,
                "document": KEYWORD,
                "revision": KEYWORD,
                "name": STORED,
                "number": {"type": "integer"},
                "total": NUMBER,
                "page": NUMBER,
                "start": NUMBER,
                "end": NUMBER,
                "hash": STORED,
                "added": {"type": "date"},
                "by": STORED,
                "text": ANALYZED,
                "vector": {"type": "dense_vector", "dims": dimensions, "index": True, "similarity": "cosine"},
            },
        },
    }


def index_name(alias: str, dimensions: int, model_revision: str) -> str:
    """The name of the index for vectors of this model revision."""
    return f"{alias}-{dimensions}-{sha256(model_revision.encode()).hexdigest()[:16]}"


def document_id(tenant: str, collection: str, name: str) -> str:
    """The id of the document of this name; ids of different tenants differ."""
    return sha256("\0".join((tenant, collection, name)).encode()).hexdigest()[:32]


def entry(document: dict[str, Any], passage: Passage, vector: Sequence[float]) -> dict[str, Any]:
    """A passage in the index's format. `document`: the fields that all its passages share."""
    return document | {
        "number": passage.number,
        "page": passage.page,
        "start": passage.start,
        "end": passage.end,
        "hash": passage.hash,
        "text": passage.text,
        "vector": list(vector),
    }


def readable(tenant: str, collections: Collection[str]) -> list[dict[str, Any]]:
    """The filter of every query: passages of these collections of this tenant. Raises ValueError if one is missing."""
    if not tenant or not collections:
        raise ValueError("a query of documents needs a tenant and a collection")
    return [{"term": {"tenant": tenant}}, {"terms": {"collection": sorted(collections)}}]


def by_words(tenant: str, collections: Collection[str], query: str) -> dict[str, Any]:
    """The BM25 search, in English and in Chinese, Japanese and Korean."""
    match = {"multi_match": {"query": query, "fields": ["text", "text.cjk"], "type": "most_fields"}}
    return {
        "query": {"bool": {"must": match, "filter": readable(tenant, collections)}},
        "size": CANDIDATES,
        "_source": SHOWN,
    }


def by_vector(tenant: str, collections: Collection[str], vector: Sequence[float]) -> dict[str, Any]:
    """The search by meaning; the filter applies while neighbours are searched, not afterwards."""
    knn = {
        "field": "vector",
        "query_vector": list(vector),
        "k": CANDIDATES,
        "num_candidates": EXAMINED,
        "filter": readable(tenant, collections),
    }
    return {"knn": knn, "size": CANDIDATES, "_source": SHOWN}


def fused(rankings: Sequence[Sequence[str]], asked_in: Language) -> list[tuple[str, float]]:
    """The ids from both rankings, by words and by vector, merged by weighted reciprocal rank fusion: best first, each with its
    score."""
    constant, weight_of_words = FUSION[asked_in]
    scores: dict[str, float] = defaultdict(float)
    for weight, ranking in zip((weight_of_words, 1.0), rankings, strict=True):
        for rank, name in enumerate(ranking, 1):
            scores[name] += weight / (constant + rank)
    return sorted(scores.items(), key=lambda each: (-each[1], each[0]))
