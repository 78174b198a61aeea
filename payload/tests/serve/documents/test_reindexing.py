"""Another model for embeddings: passages go to an index of its own, and the alias is switched, in a real Elasticsearch."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from encoder import described, make_encoder
from search_server import SearchServer, search_server
from service import Service, eventually, running

from llmserve.documents.collection import CollectionError, DocumentCollection, current_index, make_index
from llmserve.documents.embedding import Embedder, EmbeddingError, TooLong
from llmserve.documents.index import document_id, index_name
from llmserve.documents.reindexing import Reindexed, Reindexing
from llmserve.protocol import Hello

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
COLLECTIONS: dict[str, dict[str, object]] = {
    "handbook": {"tenant": "research", "readers": ["developer"]},
    "plans": {"tenant": "sales", "readers": ["developer"]},
}
MARKERS = {"handbook": "heron-7461", "plans": "crane-9953"}
MANY = 150  # passages; more than two requests to the engine


@pytest.fixture(scope="module")
def server() -> Iterator[SearchServer]:
    with search_server() as server:
        yield server


@pytest.fixture(scope="module")
def service(server: SearchServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Its gateway has a new model, `wide`; the documents of two tenants were added with `tiny`, which is served as well."""
    models = {}
    for name, width in (("wide", 64), ("tiny", 32)):
        folder = tmp_path_factory.mktemp(name)
        make_encoder(folder, width=width)
        models[name] = described(folder)
    models["other"] = models["tiny"] | {"dtype": "bfloat16"}  # of the same dimensions
    # A search that a busy machine makes too late is a 503 as well, and none of re-indexing's.
    documents = {"url": f"http://127.0.0.1:{server.port}", "model": "wide", "deadline_ms": 60_000}
    folder = tmp_path_factory.mktemp("service")
    with running(folder, models, collections=COLLECTIONS, documents=documents) as service:
        with service.client("") as anonymous:
            eventually("all engines are there", lambda: anonymous.get("/readyz").status_code == 200)
        for model in ("tiny", "other"):
            config = (folder / "gateway.yaml").read_text()
            (folder / f"{model}.yaml").write_text(config.replace("model: wide", f"model: {model}"))
        yield service


def command(service: Service, verb: str, *arguments: str, model: str = "gateway") -> tuple[int, str]:
    """Exit code and output of `llm-serve documents`."""
    config = service.folder / f"{model}.yaml"
    result = service.cli("documents", verb, "--config", str(config), *arguments)
    return result.returncode, result.stdout + result.stderr


def add(service: Service, collection: str, text: str, model: str, name: str = "rules.md") -> tuple[int, str]:
    (service.folder / name).write_text(text)
    where = ["--collection", collection, "--tenant", str(COLLECTIONS[collection]["tenant"])]
    return command(service, "add", *where, str(service.folder / name), model=model)


def search(service: Service, key: str, query: str, collection: str) -> Any:
    with service.client(key) as client:
        return client.post("/v1/search", json={"query": query, "collections": [collection], "size": 50})


def keys(service: Service) -> dict[str, str]:
    """A developer's key by collection of the tenant."""
    return {"handbook": service.key, "plans": str(service.add_key("eve", "sales")["key"])}


def test_tenants_find_their_own_documents_alone_before_during_and_after_it(
    service: Service, server: SearchServer
) -> None:
    """Until then by words alone: the model of the gateway is not that of the index."""
    for collection, marker in MARKERS.items():
        text = "\n\n".join(f"Rule {number} of {marker}." + " Travel is booked." * 30 for number in range(40))
        assert add(service, collection, text, "tiny")[0] == 0
    callers = keys(service)
    answers: list[tuple[str, Any]] = []
    ended = threading.Event()

    def asking() -> None:
        while not ended.is_set():
            for collection, key in callers.items():
                answers.append(
                    (
                        collection,
                        search(service, key, f"When is travel booked? {MARKERS[collection]}", collection),
                    )
                )

    asking_thread = threading.Thread(target=asking)
    asking_thread.start()
    try:
        eventually("each tenant has asked", lambda: len(answers) >= 4)
        code, output = command(service, "reindex")
        assert code == 0, output
        asked = len(answers)
        eventually("each tenant has asked again", lambda: len(answers) >= asked + 4)
    finally:
        ended.set()
        asking_thread.join()
    for collection, answer in answers:
        assert answer.status_code == 200, answer.text
        assert MARKERS[collection] in answer.text
        assert not [
            marker for name, marker in MARKERS.items() if name != collection and marker in answer.text
        ]
    assert "found by words alone" in service.logs()
    status = json.loads(command(service, "status", "--collection", "plans", "--tenant", "sales", "--json")[1])
    assert (status["model"], status["dimensions"], status["documents"]) == ("wide", 64, 1)
    [recorded] = [each for each in service.records() if each["event.action"] == "documents.reindexed"]
    assert recorded["llmkeep.documents.index"] == status["index"]
    assert server.ask("GET", f"/{recorded['llmkeep.documents.index_before']}")[0] == 404
    assert command(service, "reindex") == (0, f"{status['index']} already has the vectors of wide\n")


def test_a_model_of_the_same_dimensions_is_another_one_as_well(service: Service) -> None:
    """Its vectors fit in the index, and compare with none there."""
    assert add(service, "handbook", "An old rule.", "gateway", "old.md")[0] == 0
    assert command(service, "reindex", model="tiny")[0] == 0
    try:
        code, output = add(service, "handbook", "A rule.", "other", "new.md")
        assert (code, "run `llm-serve documents reindex`" in output) == (1, True), output
        assert command(service, "reindex", model="other")[0] == 0
        assert add(service, "handbook", "A rule.", "other", "new.md")[0] == 0
    finally:
        assert command(service, "reindex")[0] == 0


def test_without_a_record_nothing_is_switched(service: Service) -> None:
    """The index takes documents as before."""
    assert add(service, "handbook", "A rule.", "gateway", "another.md")[0] == 0
    config = (service.folder / "tiny.yaml").read_text()
    without = service.folder / "unrecorded.yaml"
    without.write_text(re.sub(r"(?m)^audit:\n( .*\n)+", "", config))
    code, output = command(service, "reindex", model="unrecorded")
    assert (code, "changes must be recorded" in output) == (2, True), output
    assert add(service, "handbook", "Another rule.", "gateway", "another.md")[0] == 0
    assert command(service, "reindex")[0] == 0


def nothing() -> None:
    """Nothing is changed meanwhile."""


class Model(Embedder):
    """Vectors of a text's letters, in the place of an engine's. `meanwhile` is called before each request is answered."""

    def __init__(
        self, revision: str, dimensions: int = 8, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        self.hello = Hello(f"model-{revision}", revision, "embed", 512, 1, dimensions=dimensions)
        self.meanwhile = meanwhile
        self.texts: list[str] = []

    def vectors(self, texts: Any) -> list[list[float]]:
        self.meanwhile()
        self.texts += texts
        return [
            [1.0 + len(text) * (place + 1) % 7 for place in range(self.hello.dimensions)] for text in texts
        ]


@pytest.fixture
def client(server: SearchServer) -> Iterator["Elasticsearch"]:
    from elasticsearch import Elasticsearch

    with Elasticsearch(f"http://127.0.0.1:{server.port}", request_timeout=60) as client:
        yield client


@pytest.fixture
def documents(client: "Elasticsearch", request: pytest.FixtureRequest) -> DocumentCollection:
    """A collection in an index of its own, with many passages of the model `old`."""
    alias = "test-" + re.sub("[^a-z]", "-", request.node.name)[-40:]
    collection = DocumentCollection(client, alias, "research", "handbook")
    collection.add("many.md", "\f".join(f"Page {page}." for page in range(MANY)), Model("old"))
    return collection


def run(
    documents: DocumentCollection, model: Model, recorded: Callable[[Reindexed], None] = lambda _: None
) -> Reindexed:
    return Reindexing(documents.client, documents.alias, model, lambda *_: None).run(recorded)


def names(documents: DocumentCollection) -> list[str]:
    return [each.name for each in documents.documents()]


def test_what_is_added_and_removed_meanwhile_is_carried_over(documents: DocumentCollection) -> None:
    for name in ("first.md", "last.md"):
        documents.add(name, "It goes.", Model("old"))
    removed = [document_id("research", "handbook", name) for name in ("first.md", "last.md")]
    steps: Iterator[Callable[[], object]] = iter(
        [
            lambda: documents.remove(removed[0]),
            lambda: documents.add("new.md", "It comes.", Model("old")),
            lambda: documents.remove(removed[1]),
        ]
    )
    outcome = run(documents, Model("new", 16, lambda: next(steps, nothing)()))
    assert next(steps, None) is None, "there were too few requests for the changes"
    assert names(documents) == ["many.md", "new.md"]
    assert outcome.passages == MANY + 1
    for document in removed:
        assert not documents.stored(document).revisions
    assert documents.add("new.md", "It comes.", Model("new", 16)).outcome == "unchanged"


def test_a_document_that_is_added_again_meanwhile_has_its_new_passages(documents: DocumentCollection) -> None:
    changed = "\f".join(f"Page {page} is new." for page in range(MANY // 2))
    steps: Iterator[Callable[[], object]] = iter(
        [nothing, lambda: documents.add("many.md", changed, Model("old"))]
    )
    outcome = run(documents, Model("new", 16, lambda: next(steps, nothing)()))
    assert outcome.passages == MANY // 2
    assert documents.add("many.md", changed, Model("new", 16)).outcome == "unchanged"


def test_one_that_was_killed_is_continued_and_the_old_index_serves_until_then(
    documents: DocumentCollection,
) -> None:
    requests = iter(range(1, 100))

    def dies() -> None:
        if next(requests) == 2:
            raise EmbeddingError("the engine has left")

    with pytest.raises(EmbeddingError):
        run(documents, Model("new", 16, dies))
    assert current_index(documents.client, documents.alias) == index_name(documents.alias, 8, "old")
    assert documents.add("many.md", "It takes documents.", Model("old")).outcome == "replaced"
    text = "\f".join(f"Page {page}." for page in range(MANY))
    documents.add("many.md", text, Model("old"))
    requests = iter(range(10, 100))
    model = Model("new", 16, dies)
    run(documents, model)
    assert names(documents) == ["many.md"]
    assert documents.add("many.md", text, Model("new", 16)).outcome == "unchanged"


def test_what_an_interrupted_one_has_copied_is_not_embedded_again(documents: DocumentCollection) -> None:
    requests = iter(range(1, 100))

    def dies() -> None:
        if next(requests) == 2:
            raise EmbeddingError("the engine has left")

    with pytest.raises(EmbeddingError):
        run(documents, first := Model("new", 16, dies))
    second = Model("new", 16)
    run(documents, second)
    assert first.texts
    assert len(first.texts) + len(second.texts) == MANY


def test_one_that_was_killed_before_the_switch_is_ended_by_the_next_one(
    documents: DocumentCollection,
) -> None:
    """The old index takes no writes then, and a change says what to do."""
    index = index_name(documents.alias, 8, "old")
    documents.client.indices.add_block(index=index, block="write")
    with pytest.raises(CollectionError, match="run `llm-serve documents reindex`, which was interrupted"):
        documents.add("new.md", "It comes.", Model("old"))
    with pytest.raises(CollectionError, match="takes no changes while re-indexing ends"):
        documents.remove(document_id("research", "handbook", "many.md"))
    run(documents, Model("new", 16))
    assert documents.add("new.md", "It comes.", Model("new", 16)).outcome == "added"


def test_the_model_of_before_lifts_what_a_killed_one_left(documents: DocumentCollection) -> None:
    """As where the change of the model is taken back: the half of an index goes."""
    model = Model("new", 16)
    reindexing = Reindexing(documents.client, documents.alias, model, lambda *_: None)
    reindexing.begin()
    reindexing.compare()
    reindexing.block(writes=True)
    outcome = run(documents, Model("old"))
    assert outcome.before == outcome.after
    assert not documents.client.indices.exists(index=index_name(documents.alias, 16, "new"))
    assert documents.add("new.md", "It comes.", Model("old")).outcome == "added"


def test_a_run_that_another_one_has_overtaken_brings_nothing_back(documents: DocumentCollection) -> None:
    """It had read the passages before they were removed."""
    document = document_id("research", "handbook", "many.md")

    def overtaken() -> None:
        run(documents, Model("new", 16))
        documents.remove(document)

    steps: Iterator[Callable[[], object]] = iter([overtaken])
    with pytest.raises(CollectionError, match="check whether another run has started"):
        run(documents, Model("new", 16, lambda: next(steps, nothing)()))
    documents.client.indices.refresh(index=documents.alias)
    assert not documents.stored(document).revisions


def test_a_switch_whose_answer_is_lost_is_done_and_the_next_run_says_so(
    documents: DocumentCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = Reindexing.switch

    def lost(reindexing: Reindexing) -> None:
        switch(reindexing)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(Reindexing, "switch", lost)
        with pytest.raises(TimeoutError):
            run(documents, Model("new", 16))
    outcome = run(documents, Model("new", 16))
    assert outcome.before == outcome.after
    assert documents.add("new.md", "It comes.", Model("new", 16)).outcome == "added"


def test_a_document_of_the_old_model_does_not_reach_the_new_index(documents: DocumentCollection) -> None:
    """Its vectors were made before the switch, and have as many dimensions as the new ones."""
    late = Model("old", 8, lambda: run(documents, Model("new", 8)))
    with pytest.raises(CollectionError, match=r"late\.md was only partly added"):
        documents.add("late.md", "It is late.", late)
    assert names(documents) == ["many.md"]


def test_an_index_whose_counts_differ_is_not_switched_to(
    documents: DocumentCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reindexing, "differences", lambda _: iter(()))
    with pytest.raises(CollectionError, match=f"has 0 passages, and .* {MANY}: run this again"):
        run(documents, Model("new", 16))
    assert documents.add("new.md", "It comes.", Model("old")).outcome == "added"


def test_a_passage_that_the_new_model_does_not_take_is_named(documents: DocumentCollection) -> None:
    class Short(Model):
        def vectors(self, texts: Any) -> list[list[float]]:
            if any(text == "Page 77." for text in texts):
                raise TooLong("9 tokens of 8")
            return super().vectors(texts)

    with pytest.raises(CollectionError, match=r"passage 77 of document .* \(many\.md, collection handbook"):
        run(documents, Short("new", 16))


def test_an_index_without_a_model_in_its_name_is_made_anew(client: "Elasticsearch") -> None:
    """As those before re-indexing was there."""
    alias = "test-migrated"
    make_index(client, f"{alias}-1", alias, Model("old").hello)
    collection = DocumentCollection(client, alias, "research", "handbook")
    passage = {
        "tenant": "research", "collection": "handbook", "document": "d", "revision": "r", "name": "n.md",
        "number": 0, "total": 1, "page": 1, "start": 0, "end": 8, "hash": "h", "text": "A rule.",
        "added": "2026-12-01T10:00:00+00:00", "vector": [1.0] * 8,
    }  # fmt: skip
    client.index(index=alias, id="d-r-0", document=passage, refresh=True)
    with pytest.raises(CollectionError, match="run `llm-serve documents reindex`"):
        collection.add("new.md", "It comes.", Model("old"))
    assert run(collection, Model("old")).before == f"{alias}-1"
    answer = client.search(index=alias, query={"match_all": {}}, source_excludes=["vector"])
    assert [hit["_source"] for hit in answer["hits"]["hits"]] == [
        {name: value for name, value in passage.items() if name != "vector"}
    ]


def test_an_index_in_the_place_of_the_alias_is_refused(client: "Elasticsearch") -> None:
    client.indices.create(index="test-concrete")
    collection = DocumentCollection(client, "test-concrete", "research", "handbook")
    with pytest.raises(CollectionError, match="is an index, not an alias: delete it"):
        collection.add("new.md", "It comes.", Model("old"))


def test_without_an_index_there_is_nothing_to_make_anew(client: "Elasticsearch") -> None:
    with pytest.raises(CollectionError, match="there is no index test-none to rebuild"):
        Reindexing(client, "test-none", Model("new"), lambda *_: None)


def test_an_index_of_another_alias_stays(documents: DocumentCollection) -> None:
    """Its name begins as this one's."""
    other = DocumentCollection(documents.client, f"{documents.alias}-next", "research", "handbook")
    other.add("theirs.md", "It stays.", Model("third"))
    run(documents, Model("new", 16))
    assert names(other) == ["theirs.md"]
