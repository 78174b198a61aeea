"""A rating that arrives at another host than the answer's reaches the journal that has the answer, once, through a real Redis."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import redis
from bulk_index import indexing
from elasticsearch import Elasticsearch
from redis_server import OTHER, PASSWORD, RedisServer
from service import Service, eventually, patched, running

from llmcore.ratings import (
    ANSWERED,
    ANSWERER,
    ASSIGNED,
    DELIVERED,
    FIELD,
    NAMES,
    OUTGOING,
    RATED,
    RESPONSE_ID,
    Record,
    files,
    read,
)
from llmserve.access.estate_keys import CREDENTIAL
from llmserve.access.identity import Identity
from llmserve.cli import main
from llmserve.feedback import reviews, ship
from llmserve.feedback.documents import HISTORY, LATEST
from llmserve.feedback.handover import Handover, Letter, rating_of
from llmserve.feedback.journal import SHIPPING, Journal, append
from llmserve.feedback.ratings import now
from llmserve.feedback.response_ids import ResponseIds
from llmserve.metrics import Metrics
from llmserve.redis_client import RedisClient
from llmserve.settings import Redis
from llmtrain.feedback.export import examples

CHAT = "/v1/chat/completions"
LOOK = 0.05
CORRECTION = "a correction that Redis must not hold"
DOWN = {"thumb": "down", "correction": CORRECTION}
EXPERIMENT: dict[str, object] = {
    "model": "pair",
    "control": "echo",
    "candidate": "echo-2",
    "unit": "request",
    "percent": 50,
    "salt": "0123456789abcdef",
    "tenants": ["research"],
    "shadow": 0,
    "guardrails": {"refusals": []},
}


@dataclass
class Host:
    """A serving host: its service, and keys of subjects by name and tenant."""

    service: Service
    keys: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        return self.service.folder / "journal"

    def client(self, subject: str = "ada", tenant: str = "research") -> httpx.Client:
        who = subject, tenant
        if who not in self.keys:
            self.keys[who] = self.service.add_key(*who)["key"]
        return self.service.client(self.keys[who])

    def start(self) -> None:
        self.service.start_gateway()

    def stop(self) -> None:
        if self.service.gateway:
            self.service.gateway.stop()

    def kill(self) -> None:
        if self.service.gateway:
            self.service.gateway.kill()

    def ask(self, model: str = "echo", subject: str = "ada", tenant: str = "research") -> str:
        """The id of a new answer, whose text is on disk where it is kept."""
        before = len(self.records(ANSWERED))
        messages = [{"role": "user", "content": "which ocean"}]
        with self.client(subject, tenant) as client:
            answer = client.post(CHAT, json={"model": model, "messages": messages, "max_tokens": 5})
        assert answer.status_code == 200, answer.text
        if tenant == "research":
            eventually("the answer is kept", lambda: len(self.records(ANSWERED)) > before)
        return str(answer.headers["x-llm-response-id"])

    def rate(self, identifier: str, subject: str = "ada", tenant: str = "research", **body: Any) -> int:
        with self.client(subject, tenant) as client:
            return client.post("/v1/feedback", json={"id": identifier, **(body or DOWN)}).status_code

    def records(self, kind: str = RATED) -> list[Record]:
        return [record for path in files(self.journal, kind) for record in read(path)]

    def forget(self) -> int:
        given = ["--subject", "ada", "--tenant", "research", "--folder", str(self.journal), "--wait", "0"]
        return main(["feedback", "forget", *given])


@pytest.fixture(scope="module")
def estate(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Host, Host]]:
    """Two hosts that share a Redis. Each may not delete while its file `hold` is there."""
    names = "local", OTHER
    with ExitStack() as stack:
        made = []
        for name, other in (names, names[::-1]):
            folder = tmp_path_factory.mktemp(name)
            (folder / "journal").mkdir(parents=True)
            shared: dict[str, Any] = {**redis_server.settings, "deadline_ms": 5000}
            shared |= {"user": f"gateway-{name}", "host": name, "others": [other]}
            secrets = {
                "redis.gateway": PASSWORD,
                CREDENTIAL: f"current {(b'k' * 32).hex()}\n",
                "llm-gateway.pepper": name * 16,
            }
            service = running(
                folder,
                {"echo": {"driver": "echo"}, "echo-2": {"driver": "echo"}},
                redis=shared,
                credentials=secrets,
                feedback={"folder": str(folder / "journal"), "hold": str(folder / "hold")},
                tenants={"research": {"keep_prompts": True, "reviewed_by": ["research"]}},
                experiments={"pair-1": EXPERIMENT},
                gateway_environment=patched(folder, llmserve__feedback__handover__LOOK_SECONDS=LOOK),
            )
            made.append(Host(stack.enter_context(service)))
        yield made[0], made[1]


@pytest.fixture
def hosts(estate: tuple[Host, Host], redis_server: RedisServer) -> Iterator[tuple[Host, Host]]:
    """Both hosts, with empty journals; what a test stops, starts again."""
    yield estate
    for host in estate:
        host.stop()
        (host.service.folder / "hold").unlink(missing_ok=True)
        shutil.rmtree(host.journal / SHIPPING, ignore_errors=True)
        for path in files(host.journal):
            path.unlink()
    with redis_server.client() as store:
        store.flushall()
    for host in estate:
        host.start()


def handed(one: Host, other: Host, number: int = 1) -> list[Record]:
    """The ratings in the journal of the host that answered, once nothing is outgoing at the other one."""
    eventually(
        "the ratings are handed over",
        lambda: len(one.records()) >= number and not other.records(OUTGOING),
    )
    return one.records()


def test_a_rating_is_in_the_journal_and_in_the_queue_of_the_host_that_answered_and_there_alone(
    hosts: tuple[Host, Host],
) -> None:
    one, other = hosts
    assert other.rate(one.ask()) == 200
    [rating] = handed(one, other)
    assert other.records() == []
    assert rating[FIELD + "correction"] == CORRECTION
    assert not {name for name in rating if name.endswith(("answerer", "response_id"))}
    [item], waiting, without = reviews.queue(one.journal, ["research"], 20)
    assert (item.rating, waiting, without) == (rating, 1, 0)
    assert reviews.queue(other.journal, ["research"], 20) == ([], 0, 0)
    assert other.service.metrics()['llm_ratings_handed_over_total{verdict="taken"}'] == 1


def test_it_is_one_example_and_one_document_with_its_model(
    hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = hosts
    assert other.rate(one.ask()) == 200
    [rating] = handed(one, other)
    journals = [one.journal, other.journal]
    [(transaction, example)] = examples(journals, "dpo", "2000", "9999", 9, lambda _: False)
    assert transaction == rating["transaction.id"]
    assert isinstance(example, dict)
    with indexing() as index:
        monkeypatch.setattr(ship, "connected", lambda url, _: Elasticsearch(url, max_retries=0))
        for journal in journals:
            ship.ship(journal, index.url, Path())
        documents = [source for name in (LATEST, HISTORY) for source in index.of(name).values()]
    assert [each["llm.model"] for each in documents] == ["echo", "echo"]


def test_a_rating_waits_for_a_host_that_is_away(hosts: tuple[Host, Host], redis_server: RedisServer) -> None:
    one, other = hosts
    identifier = one.ask()
    one.stop()
    assert other.rate(identifier) == 200
    eventually("it lies in Redis", lambda: letters(redis_server))
    assert [FIELD + "correction" in each for each in other.records(OUTGOING)] == [True]
    assert all(CORRECTION.encode() not in letter for letter in letters(redis_server))
    with other.client() as client:
        [listed] = client.get("/v1/feedback").json()["data"]
    assert (listed["object"], listed["correction"]) == ("rating", CORRECTION)
    one.start()
    assert len(handed(one, other)) == 1


def verdicts(store: redis.Redis) -> object:
    """What the host that answered has for the other one, sealed anew at each look."""
    return store.get(f"llm:local:ratings:{OTHER}")


def letters(redis_server: RedisServer) -> list[bytes]:
    """What Redis holds of ratings."""
    with redis_server.client() as store:
        names = store.keys("llm:*:ratings:*")
        return [value for name in names if (value := store.get(name))]


@pytest.mark.parametrize(
    "command", [("GET", f"llm:{OTHER}:ratings:third"), ("SET", f"llm:{OTHER}:ratings:local", "x")], ids=repr
)
def test_a_host_neither_reads_what_is_for_a_third_one_nor_writes_as_another(
    redis_server: RedisServer, command: tuple[str, ...]
) -> None:
    with redis.Redis(
        unix_socket_path=str(redis_server.socket), username="gateway-local", password=PASSWORD
    ) as store:
        assert store.get(f"llm:{OTHER}:ratings:local") is None
        with pytest.raises(redis.exceptions.NoPermissionError):
            store.execute_command(*command)


def test_a_rating_outlives_the_gateway_that_took_it_and_redis(
    hosts: tuple[Host, Host], redis_server: RedisServer
) -> None:
    one, other = hosts
    identifier = one.ask()
    one.stop()
    assert other.rate(identifier) == 200
    other.kill()
    with redis_server.client() as store:
        store.flushall()
    for host in hosts:
        host.start()
    assert len(handed(one, other)) == 1


def test_a_rating_that_comes_again_is_one(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    identifier = one.ask()
    one.stop()
    assert other.rate(identifier) == 200
    outgoing = {path.name: path.read_bytes() for path in files(other.journal, OUTGOING)}
    one.start()
    [rating] = handed(one, other)
    one.stop()
    other.kill()
    for (
        name,
        content,
    ) in outgoing.items():  # as if it had been killed before it noted that the rating was taken
        (other.journal / name).write_bytes(content)
    for host in hosts:
        host.start()
    assert handed(one, other) == [rating]


def test_of_two_ratings_the_later_one_stays_the_last_word(
    hosts: tuple[Host, Host], redis_server: RedisServer
) -> None:
    one, other = hosts
    identifier = one.ask()
    redis_server.stop()
    try:
        assert other.rate(identifier, thumb="down") == 200
        assert one.rate(identifier, thumb="up") == 200
    finally:
        redis_server.start()
    eventually("the earlier one is settled", lambda: not other.records(OUTGOING))
    assert [each[FIELD + "thumb"] for each in one.records()] == ["up"]
    assert [each[FIELD + "thumb"] for each in other.records()] == ["down"]


def test_what_was_forgotten_before_it_was_handed_over_never_arrives(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    forgotten, later = one.ask(), one.ask()
    one.stop()
    assert other.rate(forgotten) == 200
    eventually("it waits", lambda: other.service.metrics()["llm_ratings_outgoing"] == 1)
    assert other.forget() == 0
    eventually("it waits no more", lambda: other.service.metrics()["llm_ratings_outgoing"] == 0)
    one.start()
    assert other.rate(later, thumb="up") == 200
    assert [each[FIELD + "thumb"] for each in handed(one, other)] == ["up"]


def test_what_the_host_that_answered_forgets_does_not_come_again(
    hosts: tuple[Host, Host], redis_server: RedisServer
) -> None:
    one, other = hosts
    identifier = one.ask()
    one.stop()
    assert other.rate(identifier) == 200
    with redis_server.client() as store:
        eventually("it lies in Redis", lambda: letters(redis_server))
        other.kill()
        one.start()
        eventually("it is taken", one.records)
        assert one.forget() == 0
        for _ in range(3):  # the first of these looks may have begun before
            answers = verdicts(store)
            eventually("it looks again", lambda old=answers: verdicts(store) not in (None, old))
        assert store.exists(f"llm:{OTHER}:ratings:local"), "the rating still lies there"
    assert one.records() == []


def test_under_a_legal_hold_the_host_that_took_it_keeps_a_copy(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    (other.service.folder / "hold").touch()
    assert other.rate(one.ask()) == 200
    ratings = handed(one, other)
    assert other.records(DELIVERED) == ratings
    (other.service.folder / "hold").unlink()
    assert other.forget() == 0
    assert other.records(DELIVERED) == []


def test_an_id_of_another_tenant_or_subject_is_refused_at_both(hosts: tuple[Host, Host]) -> None:
    identifier = hosts[0].ask()
    for host in hosts:
        assert host.rate(identifier, "ada", "another") == 404
        assert host.rate(identifier, "bob") == 404
        assert host.records() == host.records(OUTGOING) == []


def test_what_the_host_that_answered_has_nothing_of_stays_where_it_was_rated(
    hosts: tuple[Host, Host],
) -> None:
    one, other = hosts
    assert other.rate(one.ask(tenant="another"), tenant="another") == 200
    eventually("it is settled", lambda: other.records() and not other.records(OUTGOING))
    assert len(other.records()) == 1
    assert one.records() == []


def test_what_is_rated_at_another_host_counts_once_for_its_arm(
    hosts: tuple[Host, Host], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = hosts
    assert other.rate(one.ask("pair"), thumb="up") == 200
    handed(one, other)
    told = []
    for host in hosts:
        arguments = ["--experiment", "pair-1", "--metrics", "thumb", "--folder", str(host.journal)]
        assert main(["feedback", "outcomes", *arguments]) == 0
        told += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["value"] for each in told if "metric" in each] == [1.0]
    assert len(one.records(ASSIGNED)) == 1


ADA = Identity("api_key", "", "ada", "research", ())


def handover(folder: Path, host: str, other: str, key: bytes = b"k" * 32) -> Handover:
    """Without a Redis."""
    folder.mkdir(exist_ok=True)
    client = RedisClient(Redis(url="unix:///nonexistent", host=host, others=(other,)), None)
    ids = ResponseIds((key,), host=host, others=(other,))
    return Handover(ids, Journal(folder, Metrics()), client, (key,), None)


def outgoing(answerer: Handover) -> Record:
    """A rating of an answer by this host, as another host has it for it."""
    identifier = answerer.ids.issue("5e" * 8, ADA)
    issued = answerer.ids.opened(identifier, ADA).issued
    return {
        "@timestamp": now(),
        "transaction.id": "5e" * 8,
        "event.created": datetime.fromtimestamp(issued, UTC).isoformat(),
        "user.id": "ada",
        "organization.id": "research",
        FIELD + "thumb": "up",
        ANSWERER: answerer.ids.host,
        RESPONSE_ID: identifier,
    }


@pytest.mark.parametrize(
    "lie",
    [
        {"user.id": "bob"},
        {"organization.id": "another"},
        {"transaction.id": "5f" * 8},
        {"event.created": "2026-01-01T00:00:00+00:00"},
        {"@timestamp": "2999-01-01T00:00:00.000+00:00"},
        {"@timestamp": 1_800_000_000},
        {FIELD + "thumb": "sideways"},
        {FIELD + "stars": 6},
        {FIELD + "answer": "a text"},
        {RESPONSE_ID: "x" * 40},
    ],
    ids=lambda lie: "-".join(map(str, *lie.items())),
)
def test_a_rating_that_the_id_does_not_bear_out_is_refused(tmp_path: Path, lie: Record) -> None:
    one = handover(tmp_path, "llm1", "llm2")
    append(tmp_path, [(ANSWERED, {name: outgoing(one)[name] for name in NAMES})])
    true, false = outgoing(one), outgoing(one) | lie
    assert one.judge({"true": true, "false": false}) == {"false": "refused"}


def test_a_rating_of_an_answer_that_the_journal_has_not_is_refused(tmp_path: Path) -> None:
    one = handover(tmp_path, "llm1", "llm2")
    append(tmp_path, [(ANSWERED, outgoing(one) | {"user.id": "bob"})])
    assert one.judge({"it": outgoing(one)}) == {"it": "refused"}


def test_a_letter_is_for_its_receiver_alone_and_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = handover(tmp_path / "1", "llm1", "llm2"), handover(tmp_path / "2", "llm2", "llm1")
    letter = Letter(at=time.time(), verdicts={"0" * 32: "taken"})
    _, _, sealed, *_ = sender.letter_command("llm2", letter)
    assert isinstance(sealed, bytes)
    assert receiver.opened("llm1", sealed) == letter
    nothing = Letter(at=0)
    assert receiver.opened("llm3", sealed) == nothing
    assert handover(tmp_path / "3", "llm3", "llm1").opened("llm1", sealed) == nothing
    assert handover(tmp_path / "2", "llm2", "llm1", b"x" * 32).opened("llm1", sealed) == nothing
    assert receiver.opened("llm1", sealed[:-1]) == nothing
    monkeypatch.setattr(time, "time", lambda: letter.at + 3600)
    assert receiver.opened("llm1", sealed) == nothing


def test_what_waits_for_a_host_that_left_the_estate_stays_as_this_hosts(tmp_path: Path) -> None:
    record = outgoing(handover(tmp_path, "llm1", "llm2"))
    append(tmp_path, [(OUTGOING, record)])
    handover(tmp_path, "llm2", "llm3").settle({"llm3": {}})
    assert not files(tmp_path, OUTGOING)
    assert [each for path in files(tmp_path, RATED) for each in read(path)] == [rating_of(record)]
