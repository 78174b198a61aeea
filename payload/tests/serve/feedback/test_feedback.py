"""Ratings through a real gateway: who may rate what, what is kept of it, and that it is on disk before the answer."""

import asyncio
import json
import os
import pwd
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from service import PEPPER, Service, events, eventually, running

from llmcore.ratings import ANSWERED, RATED, by_transaction, files, read
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError
from llmserve.cli import main
from llmserve.feedback import journal, own
from llmserve.feedback.response_ids import DAY, ResponseIds
from llmserve.metrics import Metrics

CHAT = "/v1/chat/completions"
SECRET = "sk-0123456789abcdef0123"
QUESTION = {"model": "echo", "messages": [{"role": "user", "content": f"is {SECRET} good"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway whose tenant `research` consents that text is kept; `other` does not."""
    folder = tmp_path_factory.mktemp("feedback")
    (folder / "journal").mkdir()
    feedback = {"folder": str(folder / "journal")}
    tenants: dict[str, dict[str, object]] = {"research": {"keep_prompts": True}}
    with running(folder, feedback=feedback, tenants=tenants) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def rated(service: Service, kind: str = RATED) -> list[dict[str, Any]]:
    """The journal's records of a kind."""
    return [record for path in files(service.folder / "journal", kind) for record in read(path)]


def answered(client: httpx.Client, **more: Any) -> str:
    """The id of a new answer."""
    return str(client.post(CHAT, json=QUESTION | more).headers["x-llm-response-id"])


def rate(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/feedback", json=body)


def test_every_answer_has_an_id_of_its_own_in_header_and_body(client: httpx.Client) -> None:
    whole = client.post(CHAT, json=QUESTION)
    assert whole.json()["id"] == "chatcmpl-" + whole.headers["x-llm-response-id"]
    generated = client.post("/generate", json={"prompt": "x"})
    assert (
        generated.json()["id"] == generated.headers["x-llm-response-id"] != whole.headers["x-llm-response-id"]
    )
    with client.stream("POST", CHAT, json=QUESTION | {"stream": True}) as streamed:
        identifier = streamed.headers["x-llm-response-id"]
        assert {each["id"] for each in events(streamed) if each != "[DONE]"} == {"chatcmpl-" + identifier}
    with client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as streamed:
        assert events(streamed)[-2]["id"] == streamed.headers["x-llm-response-id"]


@pytest.mark.parametrize("prefix", ["", "chatcmpl-"])
def test_a_rating_is_on_disk_when_it_is_acknowledged(
    service: Service, client: httpx.Client, prefix: str
) -> None:
    identifier = answered(client)
    answer = rate(client, id=prefix + identifier, stars=2, reason="wrong", comment="no")
    assert answer.json() == {"object": "feedback", "id": prefix + identifier, "text_kept": True}
    kept = rated(service)[-1]
    assert (kept["user.id"], kept["organization.id"]) == ("ada", "research")
    told = {name: kept[f"llmkeep.feedback.{name}"] for name in ("stars", "reason", "comment")}
    assert told == {"stars": 2, "reason": "wrong", "comment": "no"}
    intents = [each for each in service.records() if each["transaction.id"] == kept["transaction.id"]]
    assert intents[0]["gen_ai.request.model"] == "echo", "what was rated is looked up in the audit record"


def test_the_last_rating_of_an_answer_counts_and_the_others_are_history(
    service: Service, client: httpx.Client
) -> None:
    identifier = answered(client)
    for thumb in "up", "down", "up":
        assert rate(client, id=identifier, thumb=thumb).status_code == 200
    last = rated(service)[-1]
    transaction = last["transaction.id"]
    history = [each for each in rated(service) if each["transaction.id"] == transaction]
    assert [each["llmkeep.feedback.thumb"] for each in history] == ["up", "down", "up"]
    assert by_transaction(service.folder / "journal", RATED)[transaction] == last


def test_what_was_answered_is_kept_without_secrets(service: Service, client: httpx.Client) -> None:
    identifier = answered(client)
    with client.stream("POST", CHAT, json=QUESTION | {"stream": True}) as streamed:
        streamed.read()
    rate(client, id=identifier, correction=f"better: {SECRET}")
    transaction = rated(service)[-1]["transaction.id"]
    kept = eventually("both answers are kept", lambda: both(service, transaction))
    for record in kept:
        assert record["llm.model"] == "echo"
        assert record["llmkeep.feedback.prompt"] == [{"role": "user", "content": "is [key] good"}]
        assert record["llmkeep.feedback.answer"].split() == ["is", "[key]", "good"]
    assert rated(service)[-1]["llmkeep.feedback.correction"] == "better: [key]"


def both(service: Service, transaction: str) -> list[dict[str, Any]]:
    """The answer of a transaction and the one after it, once they are kept."""
    kept = rated(service, ANSWERED)
    places = [place for place, each in enumerate(kept) if each["transaction.id"] == transaction]
    return kept[places[0] : places[0] + 2] if places and len(kept) >= places[0] + 2 else []


def test_an_answer_that_the_model_did_not_end_is_not_kept(service: Service, client: httpx.Client) -> None:
    cut = answered(client, max_tokens=1)
    whole = answered(client)
    for identifier in cut, whole:
        assert rate(client, id=identifier, thumb="down").status_code == 200
    transactions = [each["transaction.id"] for each in rated(service)[-2:]]
    kept = eventually("the whole one is kept", lambda: transactions_kept(service) & {transactions[1]})
    assert kept
    assert transactions[0] not in transactions_kept(service)


def transactions_kept(service: Service) -> set[str]:
    return {each["transaction.id"] for each in rated(service, ANSWERED)}


def test_of_a_tenant_that_does_not_consent_no_text_is_kept(service: Service) -> None:
    canary = "canary-4b1f"
    with service.client(service.add_key("bob", "other")["key"]) as client:
        identifier = answered(client, messages=[{"role": "user", "content": canary}])
        answer = rate(client, id=identifier, thumb="down", comment=canary, correction=canary)
    assert answer.json()["text_kept"] is False
    assert rated(service)[-1]["llmkeep.feedback.thumb"] == "down"
    written = b"".join(path.read_bytes() for path in (service.folder / "journal").iterdir())
    assert canary.encode() not in written
    assert b'"bob"' in written


def test_an_answer_is_rated_by_the_subject_that_got_it_alone(service: Service, client: httpx.Client) -> None:
    identifier = answered(client)
    before = rated(service)
    for subject, tenant in ("bob", "research"), ("ada", "other"):
        with service.client(service.add_key(subject, tenant)["key"]) as foreign:
            refused = rate(foreign, id=identifier, thumb="up")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "response_not_found")
    altered = ("A" if identifier[0] != "A" else "B") + identifier[1:]
    for forged in altered, identifier[:-1], identifier + "A", "chatcmpl-", "ü" * 40, "A" * 40, "x":
        assert rate(client, id=forged, thumb="up").status_code == 404, forged
    assert rated(service) == before


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "set 'thumb', 'stars' or 'correction'"),
        ({"thumb": "up", "stars": 5}, "both 'thumb' and 'stars' are set"),
        ({"thumb": "sideways"}, "'thumb' is \"sideways\""),
        ({"stars": 6}, "'stars' is 6"),
        ({"stars": True}, "'stars' is true"),
        ({"thumb": "up", "reason": "because"}, "'reason' is \"because\""),
        ({"thumb": "up", "comment": "x" * 4001}, "'comment' is \"xxx"),
        ({"thumb": "up", "model": "another"}, "unsupported: 'model'"),
        ({"thumb": "up", "tenant": "other"}, "unsupported: 'tenant'"),
    ],
)
def test_a_rating_that_says_nothing_clear_is_refused(
    client: httpx.Client, body: dict[str, Any], says: str
) -> None:
    refused = rate(client, id=answered(client), **body)
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]


def test_a_megabyte_of_comment_is_refused(client: httpx.Client) -> None:
    assert rate(client, id=answered(client), thumb="up", comment="x" * 1024 * 1024).status_code == 413


def test_a_rating_that_cannot_be_kept_is_not_acknowledged(service: Service, client: httpx.Client) -> None:
    identifier = answered(client)
    folder, aside = service.folder / "journal", service.folder / "aside"
    folder.rename(aside)
    try:
        refused = rate(client, id=identifier, thumb="up")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "feedback_unavailable")
    finally:
        aside.rename(folder)
    assert rate(client, id=identifier, thumb="up").status_code == 200


def test_a_gateway_without_a_journal_answers_and_takes_no_rating(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        assert rate(client, id=answered(client), thumb="up").json()["error"]["code"] == "feedback_unavailable"


def test_no_acknowledged_rating_is_lost_when_the_gateway_is_killed(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    acknowledged: set[str] = set()
    enough = threading.Event()
    with running(tmp_path, feedback={"folder": str(tmp_path / "journal")}) as service:

        def ask() -> None:
            with service.client() as client:
                while True:
                    try:
                        identifier = answered(client)
                        if rate(client, id=identifier, stars=5).status_code == 200:
                            acknowledged.add(identifier)
                    except (httpx.HTTPError, KeyError):
                        return
                    if len(acknowledged) >= 20:
                        enough.set()

        with ThreadPoolExecutor(4) as threads:
            for _ in range(4):
                threads.submit(ask)
            assert enough.wait(60)
            assert service.gateway
            os.kill(service.gateway.process.pid, signal.SIGKILL)
        kept = by_transaction(tmp_path / "journal", RATED)
        ids = ResponseIds((PEPPER,))
        identity = Identity("api_key", "", "ada", "research", ())
        assert {ids.verify(each, identity).transaction for each in acknowledged} <= kept.keys()


def test_what_is_kept_of_a_subject_is_forgotten_and_another_tenants_namesake_stays(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    tenants: dict[str, dict[str, object]] = {"research": {"keep_prompts": True}}
    with running(tmp_path, feedback={"folder": str(folder)}, tenants=tenants) as service:
        for key in service.key, service.add_key("ada", "other")["key"]:
            with service.client(key) as client:
                rate(client, id=answered(client), thumb="up")
        forget = ["feedback", "forget", "--subject", "ada", "--tenant", "research", "--folder", str(folder)]
        said = service.cli(*forget)
        assert (said.returncode, said.stdout) == (
            0,
            "removed 2 records of ada in research on this host; 0 are left\n",
        )
        listed = service.cli("feedback", "list", "--folder", str(folder)).stdout.splitlines()
        assert [json.loads(each)["organization.id"] for each in listed] == ["other"]
        with service.client() as client:
            assert rate(client, id=answered(client), thumb="up").status_code == 200, "its gateway goes on"


def test_forgetting_as_another_user_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = pwd.getpwnam("daemon")
    os.chown(tmp_path, other.pw_uid, other.pw_gid)
    assert main(["feedback", "list", "--folder", str(tmp_path)]) == 2
    assert "belongs to daemon: run this as its owner" in capsys.readouterr().err


# The parts.


def test_an_id_is_too_old_after_its_days_and_good_on_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, identity = ResponseIds((b"key",), 30), Identity("api_key", "", "ada", "research", ())
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    identifier = ids.issue("5e" * 8, identity)
    monkeypatch.setattr("time.time", lambda: 1_000_000.0 + 30 * DAY)
    assert ids.verify(identifier, identity).transaction == "5e" * 8
    monkeypatch.setattr("time.time", lambda: 1_000_001.0 + 30 * DAY)
    with pytest.raises(ApiError) as refused:
        ids.verify(identifier, identity)
    assert (refused.value.status, refused.value.code) == (410, "response_expired")


def test_an_id_of_a_gateway_whose_clock_is_a_minute_ahead_is_good_and_one_of_tomorrow_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, identity = ResponseIds((b"key",)), Identity("api_key", "", "ada", "research", ())
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    identifier = ids.issue("5e" * 8, identity)
    monkeypatch.setattr("time.time", lambda: 1_000_000.0 - 59)
    ids.verify(identifier, identity)
    monkeypatch.setattr("time.time", lambda: 1_000_000.0 - DAY)
    with pytest.raises(ApiError) as refused:
        ids.verify(identifier, identity)
    assert "from the future" in refused.value.message


def test_tenant_and_subject_are_told_apart() -> None:
    ids = ResponseIds((b"key",))
    identifier = ids.issue("5e" * 8, Identity("api_key", "", "bc", "a", ()))
    with pytest.raises(ApiError):
        ids.verify(identifier, Identity("api_key", "", "c", "ab", ()))


def test_a_line_that_a_power_cut_has_torn_hides_no_other(tmp_path: Path) -> None:
    journal.append(tmp_path, [(RATED, {"transaction.id": "1"})])
    [path] = files(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"transaction.id": "to')
    journal.append(tmp_path, [(RATED, {"transaction.id": "2"})])
    assert list(by_transaction(tmp_path, RATED)) == ["1", "2"]


def test_what_is_not_flushed_to_the_disk_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    kept = journal.Journal(tmp_path, Metrics())
    with pytest.raises(ApiError) as refused:
        asyncio.run(kept.rate({"transaction.id": "1"}))
    assert refused.value.status == 503


def test_a_record_that_cannot_be_written_lets_no_one_wait(tmp_path: Path) -> None:
    async def both() -> list[object]:
        kept = journal.Journal(tmp_path, Metrics())
        records: list[dict[str, Any]] = [{"transaction.id": "1", "odd": object()}, {"transaction.id": "2"}]
        return await asyncio.wait_for(
            asyncio.gather(*[kept.rate(each) for each in records], return_exceptions=True), 20
        )

    first, second = asyncio.run(both())
    assert isinstance(first, ApiError)
    assert second is None or isinstance(second, ApiError)


def test_a_journal_that_is_full_of_answers_takes_ratings(tmp_path: Path) -> None:
    async def filled() -> float:
        metrics = Metrics()
        kept = journal.Journal(tmp_path, metrics, answer_bytes=10)
        for number in range(3):
            kept.answered({"transaction.id": str(number)})
            await kept.settled()
        await kept.rate({"transaction.id": "0"})
        return float(metrics.answers_not_kept._value.get())

    assert asyncio.run(filled()) == 2
    assert list(by_transaction(tmp_path, RATED)) == ["0"]


def rating(transaction: object, subject: str = "ada") -> dict[str, Any]:
    return {"transaction.id": str(transaction), "user.id": subject, "organization.id": "research"}


def outcomes(kept: journal.Journal, ratings: list[dict[str, Any]]) -> list[str]:
    """The codes of refusals of ratings that come at once; nothing for one that is kept."""

    async def together() -> list[object]:
        return await asyncio.gather(*[kept.rate(each) for each in ratings], return_exceptions=True)

    return [each.code if isinstance(each, ApiError) else str(each or "") for each in asyncio.run(together())]


def test_an_answer_is_rated_twenty_times_at_most_whichever_gateway_is_asked(tmp_path: Path) -> None:
    most = journal.RATINGS_OF_ONE
    said = outcomes(journal.Journal(tmp_path, Metrics()), [rating(1)] * (most - 1))
    said += outcomes(journal.Journal(tmp_path, Metrics()), [rating(1), rating(1), rating(2)])
    assert said == [""] * most + ["too_many_ratings", ""]


def test_the_ratings_of_a_subject_are_bounded_in_bytes_and_it_can_delete_them(tmp_path: Path) -> None:
    kept = journal.Journal(tmp_path, Metrics())
    kept.rating_bytes = 2 * len(journal.line(rating(0)))
    said = outcomes(kept, [rating(number) for number in range(3)] + [rating(9, "bob")])
    assert said == ["", "", "too_many_ratings", ""]
    assert own.forget(tmp_path, Identity("api_key", "", "ada", "research", ())).removed == 2
    assert outcomes(kept, [rating(3)]) == [""]


def test_ratings_that_an_operator_removed_count_no_longer_in_the_next_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = journal.Journal(tmp_path, Metrics())
    kept.rating_bytes = len(journal.line(rating(0)))
    monkeypatch.setattr(journal, "HOUR", "20260101T00")
    assert outcomes(kept, [rating(0), rating(1)]) == ["", "too_many_ratings"]
    journal.forget(tmp_path, lambda record: record["user.id"] == "ada")
    monkeypatch.setattr(journal, "HOUR", "20260101T09")
    assert outcomes(kept, [rating(1)]) == [""]


def test_a_full_volume_takes_no_rating_and_no_answer_and_what_is_kept_can_be_deleted(tmp_path: Path) -> None:
    kept, metrics = journal.Journal(tmp_path, Metrics()), Metrics()
    assert outcomes(kept, [rating(1)]) == [""]
    full = journal.Journal(tmp_path, metrics)
    full.reserve = 1 << 62
    assert outcomes(full, [rating(2)]) == ["feedback_unavailable"]

    async def answered() -> None:
        full.answered(rating(3))
        await full.settled()

    asyncio.run(answered())
    assert metrics.answers_not_kept._value.get() == 1
    assert own.forget(tmp_path, Identity("api_key", "", "ada", "research", ())).removed == 1


def test_a_rating_is_acknowledged_though_the_size_of_the_journal_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal, "kept_bytes", failing)
    asyncio.run(journal.Journal(tmp_path, Metrics()).rate({"transaction.id": "1"}))
    assert list(by_transaction(tmp_path, RATED)) == ["1"]


def test_a_torn_line_is_forgotten_with_any_subject(tmp_path: Path) -> None:
    journal.append(tmp_path, [(ANSWERED, {"transaction.id": "1", "user.id": "bob"})])
    [path] = files(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"user.id": "ada", "llmkeep.feedback.prompt": "secr')
    journal.append(tmp_path, [(ANSWERED, {"transaction.id": "2", "user.id": "bob"})])
    assert journal.forget(tmp_path, lambda record: record["user.id"] == "ada") == 0
    assert b"ada" not in path.read_bytes()
    assert list(by_transaction(tmp_path, ANSWERED)) == ["1", "2"]


def test_what_is_forgotten_is_gone_from_every_file_and_the_rest_stays(tmp_path: Path) -> None:
    for number, subject in enumerate(["ada", "bob", "ada"]):
        record = {
            "transaction.id": str(number),
            "user.id": subject,
            "llmkeep.feedback.comment": f"of {subject}",
        }
        journal.append(tmp_path, [(kind, record) for kind in (RATED, ANSWERED)])
    (tmp_path / "rated-20200101T00.jsonl").write_text(
        json.dumps({"transaction.id": "9", "user.id": "ada"}) + "\n"
    )
    assert journal.forget(tmp_path, lambda record: record["user.id"] == "ada") == 5
    assert not (tmp_path / "rated-20200101T00.jsonl").exists(), "nothing else was in it"
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"ada" not in left
    assert list(by_transaction(tmp_path, RATED)) == ["1"]
    assert journal.forget(tmp_path, lambda record: record["user.id"] == "ada") == 0


def test_ratings_made_while_others_are_forgotten_stay(tmp_path: Path) -> None:
    def forgetting() -> None:
        for _ in range(40):
            journal.forget(tmp_path, lambda record: record["user.id"] == "ada")

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(forgetting)
        for number in range(100):
            subject = "ada" if number % 2 else "bob"
            journal.append(tmp_path, [(RATED, {"transaction.id": str(number), "user.id": subject})])
        done.result()
    journal.forget(tmp_path, lambda record: record["user.id"] == "ada")
    assert list(by_transaction(tmp_path, RATED)) == [str(number) for number in range(0, 100, 2)]
