"""A tenant's collection in the index: documents are added, listed and removed. All of these can be repeated safely."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from llmserve.documents.embedding import Embedder, TooLong
from llmserve.documents.index import STORED, document_id, entry, index_name, mapping, readable
from llmserve.documents.passages import LETTERS_A_TOKEN, TOKENS, Passage, normalized, passages
from llmserve.protocol import Hello

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

MOST_DOCUMENTS = 10_000  # in one list


class CollectionError(Exception):
    """The index did not take or return documents; the message says why, and what to do."""


class NoText(CollectionError):
    """A document contains no letters."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document in the index. `revision`: SHA-256 of its text; `passages`: how many it has; `by`: the subject that uploaded it,
    empty for one that root added on a host.
    """

    id: str
    name: str
    revision: str
    passages: int
    by: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a collection in the index. `letters`: in its passages; `revision`: SHA-256 of its documents' ids and
    revisions; `dimensions`: of the index's vectors; `model`: the model that produced them, empty if unknown; `bytes`: of the
    whole index, with the passages and vectors of all collections, by Elasticsearch's last measurement; it measures an index at
    most once in ten seconds.
    """

    documents: int
    passages: int
    letters: int
    revision: str
    index: str
    bytes: int
    model: str
    dimensions: int
    shards: int
    failed_shards: int


@dataclass(frozen=True, slots=True)
class Stored:
    """The state of a document in the index: passages by revision (two revisions if replacing it was interrupted), and the number
    of passages of the whole document.
    """

    revisions: dict[str, int]
    total: int


@dataclass(frozen=True, slots=True)
class Addition:
    """The result of adding a document."""

    document: Document
    outcome: Literal["added", "replaced", "unchanged"]


def embedded(text: str, embedder: Embedder) -> tuple[list[Passage], list[list[float]]]:
    """The passages of a text with their vectors; passages are shorter if a text has more tokens than estimated. Raises
    EmbeddingError.
    """
    for limit in (TOKENS, TOKENS // 2):
        pieces = list(passages(text, limit))
        try:
            return pieces, embedder.vectors([piece.text for piece in pieces])
        except TooLong:
            continue
    # Where each letter is a token, as in a table of keys.
    pieces = list(passages(text, TOKENS // LETTERS_A_TOKEN))
    return pieces, embedder.vectors([piece.text for piece in pieces])


def refusal(errors: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Why Elasticsearch refused to write, and what to do. `errors`: the failures, each keyed by its operation."""
    for each in errors:
        [failure] = each.values()
        cause = failure.get("error") or failure.get("cause") or {}
        if cause.get("type") == "cluster_block_exception":
            return (
                "the index takes no changes while re-indexing ends: run this again in a minute; if it still refuses, "
                "run `llm-serve documents reindex`, which was interrupted"
            )
        if cause:
            return f"{cause.get('type')}: {str(cause.get('reason'))[:200]}; run this again"
    return "run this again"


def current_index(client: "Elasticsearch", alias: str) -> str | None:
    """The index behind the alias, or None; raises CollectionError if the alias is not one of ours."""
    if not client.indices.exists_alias(name=alias):
        if client.indices.exists(index=alias):
            raise CollectionError(
                f"{alias} is an index, not an alias: delete it, and add the documents again"
            )
        return None
    indices = list(client.indices.get_alias(name=alias))
    if len(indices) > 1:
        raise CollectionError(
            f"the alias {alias} has more than one index ({', '.join(indices)}): remove all but one"
        )
    return indices[0]


def make_index(client: "Elasticsearch", name: str, alias: str, hello: Hello) -> None:
    """Create an index with an alias for the vectors of this model; another program may have created it at the same time."""
    settings = mapping(hello.dimensions)
    settings["mappings"]["_meta"] = {"model": hello.model}
    client.options(ignore_status=400).indices.create(index=name, aliases={alias: {}}, **settings)


def prepare(client: "Elasticsearch", alias: str, hello: Hello) -> str:
    """Create the index if there is none, or add the uploader field to an older one; returns its name."""
    if current_index(client, alias) is None:
        make_index(client, index_name(alias, hello.dimensions, hello.revision), alias, hello)
    index = current_index(client, alias)
    if index is None:
        raise CollectionError(
            f"the index {alias} was not created: see elasticsearch.service on the search host"
        )
    if "by" not in client.indices.get_mapping(index=index)[index]["mappings"]["properties"]:
        client.indices.put_mapping(index=index, properties={"by": STORED})
    return index


class DocumentCollection:
    """One collection of one tenant, accessed through Elasticsearch's own client."""

    def __init__(self, client: "Elasticsearch", alias: str, tenant: str, name: str) -> None:
        self.client = client
        self.alias = alias
        self.tenant = tenant
        self.name = name

    @property
    def filter(self) -> list[dict[str, Any]]:
        return readable(self.tenant, [self.name])

    def make_index(self, hello: Hello) -> str:
        """The index of all collections, created if there is none; raises CollectionError if it is for another model."""
        name = index_name(self.alias, hello.dimensions, hello.revision)
        if current_index(self.client, self.alias) is None:
            make_index(self.client, name, self.alias, hello)
        current = current_index(self.client, self.alias)
        if current != name:
            raise CollectionError(
                f"the index {current} does not have the vectors of {hello.model}, the model named by documents.model: run "
                f"`llm-serve documents reindex`, then this command again; until then passages are found by words alone"
            )
        return name

    def stored(self, document: str) -> Stored:
        """The state of a document in the index."""
        answer = self.client.search(
            index=self.alias,
            size=1,
            query={"bool": {"filter": [*self.filter, {"term": {"document": document}}]}},
            source={"includes": ["total"]},
            aggregations={"revisions": {"terms": {"field": "revision"}}},
        )
        hits = answer["hits"]["hits"]
        buckets = answer["aggregations"]["revisions"]["buckets"]
        return Stored(
            {each["key"]: each["doc_count"] for each in buckets}, hits[0]["_source"]["total"] if hits else 0
        )

    def add(
        self,
        name: str,
        content: str,
        embedder: Embedder,
        recorded: Callable[[Addition], None] = lambda _: None,
        by: str = "",
    ) -> Addition:
        """Add or replace the document of this name. Searches find the old revision until the new one is complete. `recorded` is
        called before anything changes; `by`: the subject that uploads it.

        Raises CollectionError for a text without letters, EmbeddingError, or the client's errors.
        """
        from elasticsearch.helpers import BulkIndexError, bulk

        text = normalized(content)
        if not text.strip():
            raise NoText(f"{name} has no visible text: for a scan, add the output of OCR as a text file")
        index = self.make_index(embedder.hello)
        revision = sha256(text.encode()).hexdigest()
        document = document_id(self.tenant, self.name, name)
        before = self.stored(document)
        if before.revisions == {revision: before.total}:
            return Addition(Document(document, name, revision, before.total), "unchanged")
        pieces, vectors = embedded(text, embedder)
        shared = {
            "tenant": self.tenant,
            "collection": self.name,
            "document": document,
            "revision": revision,
            "name": name,
            "total": len(pieces),
            "added": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if by:
            shared["by"] = by
        added = Document(document, name, revision, len(pieces), by)
        addition = Addition(added, "replaced" if before.revisions else "added")
        recorded(addition)
        # By the index's own name: after a switch to another one, which has another model's vectors, it is gone.
        actions: Iterator[dict[str, Any]] = (
            {
                "_index": index,
                "_id": f"{document}-{revision[:16]}-{piece.number}",
                "_source": entry(shared, piece, vector),
            }
            for piece, vector in zip(pieces, vectors, strict=True)
        )
        try:
            bulk(self.client, actions, refresh=True)
        except BulkIndexError as error:
            raise CollectionError(f"{name} was only partly added: {refusal(error.errors)}") from None
        self.delete(document, but=revision)
        return addition

    def delete(self, document: str, but: str | None = None) -> None:
        """Delete the passages of a document except those of one revision."""
        query: dict[str, Any] = {"filter": [*self.filter, {"term": {"document": document}}]}
        if but:
            query["must_not"] = {"term": {"revision": but}}
        # 403 has the failures where the index takes no writes.
        answer = self.client.options(ignore_status=403).delete_by_query(
            index=self.alias, query={"bool": query}, refresh=True, conflicts="proceed"
        )
        if error := answer.get("error"):
            raise CollectionError(
                f"passages of {document} were not deleted: {refusal([{'delete': {'error': error}}])}"
            )
        if answer["failures"] or answer["version_conflicts"]:
            reason = refusal([{"delete": each} for each in answer["failures"]])
            raise CollectionError(f"not all passages of {document} were deleted: {reason}")

    def remove(self, document: str) -> bool:
        """Remove a document by its id; False if there is none. Raises CollectionError if a passage is left."""
        if not self.stored(document).revisions:
            return False
        self.delete(document)
        if remaining := self.stored(document).revisions:
            raise CollectionError(
                f"{sum(remaining.values())} passages of {document} are left: run this again"
            )
        return True

    def documents(self) -> list[Document]:
        """The documents of the collection, by name."""
        if not self.client.indices.exists_alias(name=self.alias):
            return []
        answer = self.client.search(
            index=self.alias,
            size=MOST_DOCUMENTS,
            query={"bool": {"filter": [*self.filter, {"term": {"number": 0}}]}},
            source={"includes": ["document", "name", "revision", "total", "by"]},
        )
        return sorted(
            (
                Document(
                    source["document"],
                    source["name"],
                    source["revision"],
                    source["total"],
                    source.get("by", ""),
                )
                for source in (hit["_source"] for hit in answer["hits"]["hits"])
            ),
            key=lambda document: document.name,
        )

    def status(self) -> Status:
        """The state of the collection in the index; raises CollectionError if there is no index."""
        index = current_index(self.client, self.alias)
        if index is None:
            raise CollectionError(f"there is no index {self.alias} yet: add a document")
        answer = self.client.search(
            index=self.alias,
            size=0,
            track_total_hits=True,
            query={"bool": {"filter": self.filter}},
            aggregations={"start": {"sum": {"field": "start"}}, "end": {"sum": {"field": "end"}}},
        )
        fields = self.client.indices.get_mapping(index=index)[index]["mappings"]
        size = self.client.indices.stats(index=index, metric="store")["_all"]["total"]["store"]
        documents = self.documents()
        pairs = sorted(f"{document.id} {document.revision}\n" for document in documents)
        sums, shards = answer["aggregations"], answer["_shards"]
        return Status(
            documents=len(documents),
            passages=answer["hits"]["total"]["value"],
            letters=int(sums["end"]["value"] - sums["start"]["value"]),
            revision=sha256("".join(pairs).encode()).hexdigest(),
            index=index,
            bytes=size["size_in_bytes"],
            model=fields.get("_meta", {}).get("model", ""),
            dimensions=fields["properties"]["vector"]["dims"],
            shards=shards["total"],
            failed_shards=shards["failed"],
        )
