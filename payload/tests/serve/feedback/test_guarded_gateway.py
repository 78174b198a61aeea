"""Guardrails: a candidate that does harm is ended on its host without a person, and only a signed policy begins anew."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from authority import signed_bundle
from guarded_experiment import ENTRY, SUPPORT, lines
from questions import CHAT
from scripted_upstream import END, USAGE, ScriptedUpstream, answer, delta, stream
from service import Service, eventually, running

from llmcore.experiments import identifier
from llmcore.ratings import ASSIGNED, ENDED, files, read
from llmserve.access.identity import Identity
from llmserve.api.errors import deadline_exceeded
from llmserve.asgi import Exchange
from llmserve.cli import main
from llmserve.feedback import journal
from llmserve.feedback.guard import Guard
from llmserve.feedback.halts import GUARD, WATCHED
from llmserve.feedback.journal import Journal
from llmserve.feedback.ratings import Ratings
from llmserve.feedback.response_ids import ResponseIds
from llmserve.metrics import Metrics

QUESTION = {"model": "support", "messages": [{"role": "user", "content": "is it good"}], "max_tokens": 5}
BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "i CANNOT say"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(tmp_path_factory.mktemp("upstream") / "m.sock")
    yield server
    server.stop()


@pytest.fixture
def service(tmp_path: Path, upstream: ScriptedUpstream) -> Iterator[Service]:
    """A gateway whose candidate is a scripted server, and whose experiments have to be watched."""
    (tmp_path / "journal").mkdir(mode=0o700)
    with running(
        tmp_path,
        {"support-7": {"driver": "echo"}},
        remotes={"m": {"socket": str(upstream.listener.getsockname()), "revision": "r"}},
        feedback={"folder": str(tmp_path / "journal"), "guarded": True},
        experiments={"support-12": ENTRY},
    ) as service:
        yield service


def guard_of(service: Service) -> Guard:
    folder = service.folder
    return Guard(folder / "journal", folder / "bundle.tar.gz", folder / "policy.pem", folder / "audit.sock")


def intents(service: Service) -> list[dict[str, Any]]:
    return [each for each in service.records() if each.get("llmkeep.audit.phase") == "intent"]


def met(service: Service, requests: int, **more: Any) -> set[tuple[str, str]]:
    """Models that were asked by so many requests, and why not the arm's."""
    before = len(intents(service))
    with service.client() as client:
        for _ in range(requests):
            client.post(CHAT, json=QUESTION | more)
    return {
        (each["gen_ai.request.model"], each.get("llmkeep.experiment.away", ""))
        for each in intents(service)[before:]
    }


def ends(service: Service) -> list[dict[str, Any]]:
    """How assigned requests ended, once that is kept of each."""

    def counted() -> int:
        assigned = [each for each in intents(service) if "llmkeep.experiment.arm" in each]
        return sum("llmkeep.experiment.away" not in each for each in assigned)

    def kept() -> list[dict[str, Any]]:
        return [each for path in files(service.folder / "journal", ENDED) for each in read(path)]

    eventually("all ends are kept", lambda: len(kept()) == counted())
    return kept()


def of_arm(found: list[dict[str, Any]], arm: str, name: str) -> set[Any]:
    return {each[f"llmkeep.experiment.{name}"] for each in found if each["llmkeep.experiment.arm"] == arm}


def test_a_candidate_that_fails_is_ended_on_record_and_stays_so_until_policy_has_another_salt(
    service: Service, upstream: ScriptedUpstream
) -> None:
    control_alone = {("support-7", ""), ("support-7", "unwatched")}
    assert met(service, 24) == control_alone, "nothing watches it yet"
    guard = guard_of(service)
    assert guard.look() == []
    upstream.script = answer({"error": {"message": "out of memory"}}, 500)
    both = {("support-7", ""), ("m", "")}
    eventually("the candidate is asked", lambda: met(service, 8) == both)
    met(service, 100)
    assert len(ends(service)) >= 100
    [halt] = guard.look()
    assert (halt.test, halt.experiment.name) == ("failed", "support-12")
    assert guard.look() == [], "once"
    [event] = [each for each in service.records() if each["event.action"] == "experiment.halted"]
    assert event["llmkeep.experiment.name"] == "support-12"
    assert "failed at 50 %: candidate" in event["event.reason"]
    after = {("support-7", ""), ("support-7", "halted")}
    eventually("the control answers all", lambda: met(service, 12) == after)
    assert service.metrics()['llm_experiment_halted{experiment="support-12"}'] == 1
    assert service.gateway
    service.gateway.kill()
    service.start_gateway()
    eventually("after a restart, too", lambda: met(service, 12) == after)
    changed = ENTRY | {"percent": 99}
    bundle = service.folder / "bundle.tar.gz"
    bundle.write_bytes(signed_bundle(2, experiments={"support-12": changed}))
    guard.look()
    eventually(
        "policy is read", lambda: met(service, 1) and intents(service)[-1]["llmkeep.decision.revision"] == 2
    )
    assert met(service, 12) <= after, "another percentage is no other experiment"
    bundle.write_bytes(signed_bundle(3, experiments={"support-12": changed | {"salt": "fedcba9876543210"}}))
    guard.look()
    eventually("the candidate is asked again", lambda: ("m", "") in met(service, 4))


def test_a_guard_that_has_not_looked_for_long_is_none(service: Service) -> None:
    assert main(["experiment", "guard", "--once", "--config", str(service.folder / "gateway.yaml")]) == 0
    eventually("it is watched", lambda: ("m", "") in met(service, 4))
    os.utime(service.folder / "journal" / GUARD / WATCHED, (1, 1))
    eventually("it is not", lambda: met(service, 8) == {("support-7", ""), ("support-7", "unwatched")})


def test_how_an_arm_answers_is_kept_without_its_text(service: Service, upstream: ScriptedUpstream) -> None:
    guard_of(service).look()
    upstream.script = answer(BODY)
    eventually("the candidate is asked", lambda: ("m", "") in met(service, 4))
    found = ends(service)
    identity = identifier("support-12", ENTRY["salt"])
    for name, expected in (
        ("refused", True),
        ("failed", False),
        ("tokens", 2),
        ("percent", 50),
        ("id", identity),
    ):
        assert of_arm(found, "candidate", name) == {expected}
    assert all(0 < each["llmkeep.experiment.seconds"] < 20 for each in found)
    assert "CANNOT" not in json.dumps(found)
    met(service, 24, stream=True)
    assert of_arm(ends(service), "control", "refused") == {False}
    for script, more, name in (
        (stream(delta("ended by a filter", "content_filter"), USAGE, END), {"stream": True}, "refused"),
        (answer({"error": {"message": "the other engine takes it"}}, 400), {}, "failed"),
    ):
        before = len(ends(service))
        upstream.script = script
        met(service, 24, **more)
        after = ends(service)[before:]
        assert (of_arm(after, "candidate", name), of_arm(after, "control", name)) == ({True}, {False})


@pytest.mark.parametrize(("hurried", "failed"), [(True, False), (False, True)])
def test_a_deadline_of_the_clients_own_is_no_failure(hurried: bool, failed: bool, tmp_path: Path) -> None:
    noted: list[dict[str, Any]] = []
    ratings = Ratings(ResponseIds((b"",)), Journal(tmp_path, Metrics()), Metrics())
    ratings.journal.ended = noted.append  # type: ignore[union-attr, method-assign]
    exchange = Exchange(b"", b"", False, 0.0, hurried=hurried)
    exchange.identity = Identity("api_key", "1", "ada", "research", ("developer",))
    exchange.assigned = SUPPORT.assign(exchange.identity, exchange.transaction)
    ratings.ended(exchange, deadline_exceeded(0.5))
    assert [each["llmkeep.experiment.failed"] for each in noted] == [failed]


def test_a_candidate_in_the_shadow_is_asked_a_copy_on_record_and_no_client_sees_it(
    service: Service, upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow = ENTRY | {"percent": 0, "shadow": 100}
    (service.folder / "bundle.tar.gz").write_bytes(signed_bundle(2, experiments={"support-12": shadow}))
    upstream.script = answer(BODY)
    guard_of(service).look()

    def copies() -> list[dict[str, Any]]:
        return [each for each in intents(service) if "llmkeep.experiment.shadow" in each]

    def asked() -> bool:
        with service.client() as client:
            given = client.post(CHAT, json=QUESTION)
            assert given.headers["x-llm-model"] == given.json()["model"] == "support"
            assert "CANNOT" not in given.text
        return bool(copies())

    eventually("a copy is asked", asked)
    copy = copies()[0]
    originals = {each["transaction.id"]: each for each in intents(service) if each not in copies()}
    original = originals[copy["llmkeep.experiment.shadow"]]
    assert (original["gen_ai.request.model"], copy["gen_ai.request.model"]) == ("support-7", "m")
    assert original["llmkeep.prompt.hmac"] == copy["llmkeep.prompt.hmac"]
    assert (copy["llmkeep.experiment.arm"], copy["user.id"]) == ("candidate", "ada")
    outcome = eventually("its outcome is on record", lambda: [
        each for each in service.records()
        if each["transaction.id"] == copy["transaction.id"] and each["llmkeep.audit.phase"] == "outcome"
    ])  # fmt: skip
    assert outcome[0]["event.outcome"] == "success"

    def told() -> list[dict[str, Any]]:
        """What the command says, once it has heard of each copy."""
        capsys.readouterr()
        folder = str(service.folder / "journal")
        assert main(["experiment", "shadow", "--experiment", "support-12", "--folder", folder]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return found if found[0]["answers"] == len(copies()) else []

    control, candidate = eventually("each copy is told", told)
    assert control["answers"] == candidate["answers"]
    assert (control["refused"], candidate["refused"]) == (0, candidate["answers"])
    assert guard_of(service).look() == []
    upstream.script = answer({"error": {"message": "out of memory"}}, 500)
    eventually("a copy fails", lambda: asked() and (each := told()) and each[1]["failed"])
    upstream.script = answer({"error": {"message": "users first"}}, 429)
    full = eventually("a copy has no room", lambda: asked() and [
        each["transaction.id"] for each in service.records()
        if each.get("error.code") == "overloaded" and "llmkeep.experiment.shadow" in each
    ])  # fmt: skip
    upstream.script = answer(BODY)

    def copied() -> set[str]:
        return {
            each["transaction.id"] for path in files(service.folder / "journal", ENDED) for each in read(path)
        }

    known = {each["transaction.id"] for each in copies()}
    eventually(
        "a later one is noted",
        lambda: asked() and any(each["transaction.id"] in copied() - known for each in copies()),
    )
    assert not copied() & set(full)


def test_a_promoted_candidate_needs_no_room_in_the_journal_and_takes_none(
    service: Service, upstream: ScriptedUpstream
) -> None:
    folder = service.folder / "journal"
    promoted = ENTRY | {"percent": 100}
    (service.folder / "bundle.tar.gz").write_bytes(signed_bundle(2, experiments={"support-12": promoted}))
    journal.append(folder, lines(1, "control", "a"))
    guard = guard_of(service)
    guard.most_bytes = 100
    guard.look()
    upstream.script = answer(BODY)
    eventually("all have the candidate", lambda: met(service, 4) == {("m", "")})
    kept = [each for path in files(folder, ASSIGNED) for each in read(path)]
    assert 100 not in {each["llmkeep.experiment.percent"] for each in kept}


def test_halts_that_cannot_be_read_count_and_stop_no_guard(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = service.folder / "journal"
    (folder / GUARD / f"halted-{SUPPORT.id}.json").mkdir(parents=True)
    garbage = ["null", "[1]", '{"experiment": [1]}', "[" * 100_000, "\x00"]
    for number, text in enumerate(garbage):
        (folder / GUARD / f"halted-{number}.json").write_text(text)
    guard_of(service).look()
    told = [each for each in service.records() if each["event.action"] == "experiment.halted"]
    assert {each["llmkeep.experiment.name"] for each in told} == {SUPPORT.id, "0", "1", "2", "3", "4"}
    assert {each["event.reason"] for each in told} == {"unreadable"}
    eventually("the control answers", lambda: ("support-7", "halted") in met(service, 4))
    capsys.readouterr()
    assert main(["experiment", "halted", "--folder", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
