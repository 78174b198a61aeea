"""Re-indexing: every passage is embedded by another model into a new index, to which the alias is then switched.

Passages are compared and copied until both indices have the same ones; during the last comparison the old index accepts no
writes. So additions and removals made meanwhile are carried over, and the next run continues one that was killed. Until the
switch, no search reads the new index. Each run writes through its own alias, which the next run or the switch removes, so that a
run that was believed dead can write nothing more.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from llmserve.documents.collection import CollectionError, current_index, make_index
from llmserve.documents.embedding import TEXTS, Embedder, TooLong
from llmserve.documents.index import index_name

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

PAGE = 1000  # passages of one comparison
SORT = ["document", "revision", "number", "added"]  # by which a passage is itself in both indices
COMPARISONS = 10  # before the last one; each has only what changed during the one before

type Key = tuple[str, str, int, int]
type Difference = tuple[Literal["copy", "delete"], str]


@dataclass(frozen=True, slots=True)
class Reindexed:
    """The index behind the alias after and before the run, and its number of passages. Both are the same if there was nothing to
    do."""

    before: str
    after: str
    passages: int


class Reindexing:
    """One run, from the index behind the alias to the index of the embedder's model."""

    def __init__(
        self, client: "Elasticsearch", alias: str, embedder: Embedder, progress: Callable[[int, int], None]
    ) -> None:
        """`progress` is called with the numbers of passages in the new and the old index. Raises CollectionError if there is no
        index yet.
        """
        self.client = client
        self.alias = alias
        self.embedder = embedder
        self.progress = progress
        before = current_index(client, alias)
        if before is None:
            raise CollectionError(f"there is no index {alias} to rebuild: add a document first")
        self.before: str = before
        self.after = index_name(alias, embedder.hello.dimensions, embedder.hello.revision)
        self.own = f"{alias}-next-{uuid4().hex}"

    def run(self, recorded: Callable[[Reindexed], None]) -> Reindexed:
        """Copy, switch and delete the old index. `recorded` is called before the switch.

        Raises CollectionError, EmbeddingError, or the client's errors; the alias then has the old index, which takes writes.
        """
        self.delete_others()
        if self.before == self.after:
            self.block(False)
            return Reindexed(self.before, self.after, self.count(self.after))
        self.begin()
        for _ in range(COMPARISONS):
            if self.compare() <= TEXTS:
                break
        self.block(True)
        switched = False
        try:
            self.client.indices.refresh(index=self.before)
            while self.compare():
                pass
            outcome = Reindexed(self.before, self.after, self.count(self.after))
            if (expected := self.count(self.before)) != outcome.passages:
                raise CollectionError(
                    f"{self.after} has {outcome.passages} passages, and {self.before} {expected}: run this again"
                )
            recorded(outcome)
            self.switch()
            switched = True
        finally:
            if not switched:
                self.block(False)
        return outcome

    def delete_others(self) -> None:
        """Delete what runs for other models left behind: indices with the alias of a run."""
        aliases = self.client.indices.get_alias(index=f"{self.alias}-*")
        orphans = [
            name
            for name, each in aliases.items()
            if self.runs(each["aliases"]) and name not in {self.before, self.after}
        ]
        if orphans:
            self.change([{"remove_index": {"index": name}} for name in orphans])

    def runs(self, aliases: Iterable[str]) -> list[str]:
        """Those of these aliases through which runs write."""
        pattern = re.compile(re.escape(self.alias) + "-next-[0-9a-f]{32}")
        return sorted(filter(pattern.fullmatch, aliases))

    def begin(self) -> None:
        """Create the new index, or continue with an existing one; from here on, no other run writes to it."""
        if not self.client.indices.exists(index=self.after):
            make_index(self.client, self.after, self.own, self.embedder.hello)
        others = self.runs(self.client.indices.get_alias(index=self.after)[self.after]["aliases"])
        remove = [
            {"remove": {"index": self.after, "alias": name, "must_exist": True}}
            for name in others
            if name != self.own
        ]
        self.change([*remove, {"add": {"index": self.after, "alias": self.own}}])
        self.client.indices.refresh(index=self.after)  # what an interrupted run has copied

    def switch(self) -> None:
        """Switch the alias in one change of the cluster's state; refused if another run has begun."""
        self.change(
            [
                {"remove": {"index": self.after, "alias": self.own, "must_exist": True}},
                {"add": {"index": self.after, "alias": self.alias}},
                {"remove_index": {"index": self.before}},
            ]
        )

    def change(self, actions: list[dict[str, Any]]) -> None:
        """Change aliases, all or none."""
        from elasticsearch import NotFoundError

        try:
            self.client.indices.update_aliases(actions=actions)
        except NotFoundError:
            raise self.superseded() from None

    def superseded(self) -> CollectionError:
        return CollectionError(
            f"another run has started to re-index {self.alias}, or has finished: check its output"
        )

    def block(self, writes: bool) -> None:
        """Set whether the old index refuses writes; waits for writes in progress."""
        if writes:
            self.client.indices.add_block(index=self.before, block="write")
        else:
            # It is gone where the answer to the switch was lost.
            settings = {"index.blocks.write": None}
            self.client.options(ignore_status=404).indices.put_settings(index=self.before, settings=settings)

    def count(self, index: str) -> int:
        return int(self.client.count(index=index)["count"])

    def compare(self) -> int:
        """Copy the passages that the new index lacks, and delete those that are gone from the old one; returns the number of
        passages."""
        changed, total = 0, self.count(self.before)
        passages = self.count(self.after)
        for batch in batched(self.differences(), TEXTS, strict=False):
            self.apply(batch)
            changed += len(batch)
            passages += sum(1 if kind == "copy" else -1 for kind, _ in batch)
            self.progress(passages, total)
        self.client.indices.refresh(index=self.after)
        return changed

    def differences(self) -> Iterator[Difference]:
        """The operation for each passage that only one of the indices has. Both are read in the same order, page by page."""
        theirs, ours = self.passages(self.before), self.passages(self.after)
        there, here = next(theirs, None), next(ours, None)
        while there or here:
            if here is None or (there is not None and there[0] < here[0]):
                if there:
                    yield "copy", there[1]
                there = next(theirs, None)
            elif there is None or here[0] < there[0]:
                yield "delete", here[1]
                here = next(ours, None)
            else:
                there, here = next(theirs, None), next(ours, None)

    def passages(self, index: str) -> Iterator[tuple[Key, str]]:
        """Each passage's place in the order and its id, in that order."""
        after: dict[str, Any] = {}
        while True:
            answer = self.client.search(index=index, size=PAGE, sort=SORT, source=False, **after)
            if answer["timed_out"] or answer["_shards"]["failed"]:
                raise CollectionError(f"a part of {index} does not answer: see elasticsearch.service there")
            hits = answer["hits"]["hits"]
            for hit in hits:
                document, revision, number, added = hit["sort"]
                yield (document, revision, number, added), hit["_id"]
            if len(hits) < PAGE:
                return
            after = {"search_after": hits[-1]["sort"]}

    def apply(self, batch: tuple[Difference, ...]) -> None:
        """Deletions come first, because a passage that was added again is deleted and copied."""
        from elasticsearch.helpers import BulkIndexError, bulk

        deleted = [name for kind, name in batch if kind == "delete"]
        if deleted:
            self.client.delete_by_query(
                index=self.own, query={"ids": {"values": deleted}}, conflicts="proceed", refresh=True
            )
        copied = [name for kind, name in batch if kind == "copy"]
        if not copied:
            return
        answer = self.client.mget(index=self.before, ids=copied, source_excludes=["vector"])
        # One that was removed meanwhile is not there.
        sources = {each["_id"]: each["_source"] for each in answer["docs"] if each.get("found")}
        vectors = self.vectors(list(sources.values()))
        actions = (
            {"_index": self.own, "_id": name, "_source": source | {"vector": vector}}
            for (name, source), vector in zip(sources.items(), vectors, strict=True)
        )
        try:
            bulk(self.client, actions, require_alias=True)
        except BulkIndexError as error:
            raise CollectionError(
                f"passages were not copied ({str(error.errors[:1])[:300]}): check whether another run has started, else run this "
                f"again"
            ) from None

    def vectors(self, sources: list[dict[str, Any]]) -> list[list[float]]:
        """The vectors of these passages; raises CollectionError for one that is too long for the model."""
        try:
            return self.embedder.vectors([source["text"] for source in sources])
        except TooLong:
            for source in sources:
                self.vector_or_name(source)
            raise

    def vector_or_name(self, source: dict[str, Any]) -> None:
        try:
            self.embedder.vectors([source["text"]])
        except TooLong as error:
            raise CollectionError(
                f"passage {source['number']} of document {source['document']} ({source['name']}, collection "
                f"{source['collection']} of {source['tenant']}) is too long for {self.embedder.hello.model} ({error}): "
                "remove that document, re-index, and add it again"
            ) from None
