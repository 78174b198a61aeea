"""Arms of an experiment through a real gateway: who is asked of which model, what is on record, and what the client learns."""

import json
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import authority
import httpx2 as httpx
import pytest
from questions import CHAT, error
from redis_server import PASSWORD, RedisServer
from scripted_opa import ALLOWED
from scripted_upstream import END, USAGE, Script, ScriptedUpstream, answer, delta, stream
from service import PEPPER, Service, events, eventually, running

from llmcore.experiments import identifier
from llmcore.ratings import ASSIGNED, files, read
from llmserve.access.api_keys import edited, new_key
from llmserve.access.decision import PolicyUnavailable, parse_decision
from llmserve.access.experiments import Arm, Experiment
from llmserve.access.identity import Identity
from llmserve.cli import main
from llmserve.feedback import journal

SUPPORT = Experiment("support-12", "support", "support-7", "support-8", "subject", 50, "0123456789abcdef")
WRITER = Experiment("writer-1", "writer", "support-7", "m", "request", 100, "fedcba9876543210")
QUESTION = {"model": "support", "messages": [{"role": "user", "content": "is it good"}], "max_tokens": 5}
ECHO = {"driver": "echo"}
BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "m",
    "system_fingerprint": "fp_m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "half \ud800"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


def of_policy(experiment: Experiment) -> dict[str, object]:
    """As policy has it."""
    names = "model", "control", "candidate", "unit", "percent", "salt"
    whole = {name: getattr(experiment, name) for name in names}
    return whole | {"tenants": ["research"], "shadow": 0, "guardrails": {"refusals": []}}


def who(subject: str) -> Identity:
    return Identity("api_key", "1", subject, "research", ("developer",))


def of_arm(arm: Arm, nth: int = 0) -> str:
    """A subject that the experiment has in this arm."""
    found = (name for name in map("subject{}".format, range(100)) if SUPPORT.assign(who(name), "").arm == arm)
    return [next(found) for _ in range(nth + 1)][-1]


class Watching(ScriptedUpstream):
    """Notes what is on record at the moment when it is asked."""

    def __init__(self, address: Path) -> None:
        super().__init__(address)
        self.service: Service | None = None
        self.on_record: list[dict[str, Any]] = []

    def play(self, connection: Any, script: Script) -> None:
        if script is self.script and self.service:
            self.on_record = self.service.records()
        super().play(connection, script)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watching]:
    server = Watching(tmp_path_factory.mktemp("upstream") / "m.sock")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, upstream: Watching
) -> Iterator[Service]:
    """A gateway whose policy has an experiment on `support`, half and half, and one on `writer`, all on a remote server."""
    folder = tmp_path_factory.mktemp("arms")
    (folder / "journal").mkdir()
    with running(
        folder,
        {"support-7": ECHO, "support-8": ECHO},
        remotes={"m": {"socket": str(upstream.listener.getsockname()), "revision": "r"}},
        redis={**redis_server.settings, "deadline_ms": 5000},
        credentials={"redis.gateway": PASSWORD},
        feedback={"folder": str(folder / "journal")},
        experiments={each.name: of_policy(each) for each in (SUPPORT, WRITER)},
    ) as service:
        upstream.service = service
        yield service


def client_of(service: Service, subject: str, tenant: str = "research") -> httpx.Client:
    with edited(service.folder / "keys.json") as records:
        key, record = new_key(PEPPER, subject, tenant, ["developer"], None)
        records.append(record)
    return service.client(key)


def ask(service: Service, client: httpx.Client, **more: Any) -> tuple[httpx.Response, dict[str, Any]]:
    """An answer, and the intent that is on record."""
    given = client.post(CHAT, json=QUESTION | more)
    intents = [each for each in service.records() if each.get("llmkeep.audit.phase") == "intent"]
    return given, intents[-1]


def assigned(service: Service) -> list[dict[str, Any]]:
    """The journal's assignments."""
    return [record for path in files(service.folder / "journal", ASSIGNED) for record in read(path)]


def told(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> list[dict[str, Any]]:
    """What `llm-serve feedback outcomes` prints."""
    arguments = ["feedback", "outcomes", "--experiment", "support-12", "--folder", str(folder), *more]
    assert main(arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_unit_keeps_its_arm_while_the_percentage_grows() -> None:
    people = [who(f"subject{number}") for number in range(10_000)]
    before: set[int] = set()
    for percent in 0, 1, 5, 25, 50, 100:
        experiment = Experiment("e", "m", "a", "b", "subject", percent, "0123456789abcdef")
        found = [experiment.assign(each, "") for each in people]
        candidates = {number for number, each in enumerate(found) if each.arm == "candidate"}
        assert before <= candidates, f"at {percent} %"
        share = percent / 100
        assert abs(len(candidates) - 10_000 * share) <= 4 * math.sqrt(10_000 * share * (1 - share))
        assert len({each.unit for each in found}) == 10_000
        before = candidates


def test_experiments_assign_apart_from_each_other() -> None:
    one, other = (
        Experiment(name, "m", "a", "b", "subject", 50, "0123456789abcdef") for name in ("one", "other")
    )
    people = [who(f"subject{number}") for number in range(10_000)]
    both = sum(one.assign(each, "").arm == other.assign(each, "").arm == "candidate" for each in people)
    assert abs(both - 2500) <= 4 * math.sqrt(10_000 * 0.25 * 0.75)
    assert one.assign(people[0], "").unit != other.assign(people[0], "").unit
    assert one.assign(people[0], "1") == one.assign(people[0], "2"), (
        "the subject is the unit, not the request"
    )


@pytest.mark.parametrize(
    "change", [{"percent": 101}, {"percent": "5"}, {"unit": "conversation"}, {"salt": ""}, {"control": None}]
)
def test_a_decision_with_a_broken_experiment_is_none(change: dict[str, Any]) -> None:
    whole = of_policy(SUPPORT) | {"name": "support-12", "refusals": []}
    assert parse_decision(ALLOWED | {"experiments": [whole]}).experiments == (SUPPORT,)
    with pytest.raises(PolicyUnavailable):
        parse_decision(ALLOWED | {"experiments": [whole | change]})


@pytest.mark.parametrize("arm", ["control", "candidate"])
def test_a_subject_always_has_the_same_arm_and_does_not_learn_it(service: Service, arm: Arm) -> None:
    with client_of(service, of_arm(arm)) as client:
        for _ in range(3):
            given, intent = ask(service, client)
            assert intent["gen_ai.request.model"] == getattr(SUPPORT, arm)
            recorded = [intent[f"llmkeep.experiment.{name}"] for name in ("name", "arm", "percent")]
            assert recorded == ["support-12", arm, 50]
            assert given.json()["model"] == given.headers["x-llm-model"] == "support"
            assert given.json()["system_fingerprint"] == "fp_undisclosed"
            assert "support-" not in given.text + str(given.headers)
        completed = client.post("/v1/completions", json={"prompt": "x", "model": "support"})
        assert completed.json()["model"] == completed.headers["x-llm-model"] == "support"
        responded = client.post("/v1/responses", json={"input": "x", "model": "support"})
        assert responded.json()["model"] == responded.headers["x-llm-model"] == "support"
        assert "support-" not in responded.text
        with client.stream("POST", CHAT, json=QUESTION | {"stream": True}) as streamed:
            assert {each["model"] for each in events(streamed) if each != "[DONE]"} == {"support"}
        listed = client.get("/v1/models").json()["data"]
        assert {"support", "writer"} <= {each["id"] for each in listed}
        assert client.get("/v1/models/support").json()["revision"] is None


def test_an_arm_is_on_record_before_its_engine_is_asked(service: Service, upstream: Watching) -> None:
    upstream.script = answer(BODY)
    with service.client() as client:
        given, intent = ask(service, client, model="writer")
        assert given.status_code == 200, given.text
        assert intent["llmkeep.experiment.arm"] == "candidate"
        assert intent in upstream.on_record
        assert given.json()["model"] == given.headers["x-llm-model"] == "writer"
        assert given.json()["choices"] == json.loads(json.dumps(BODY["choices"])), "all else passes through"
        assert given.json()["system_fingerprint"] == "fp_undisclosed"
        upstream.script = stream(delta("half", "stop"), USAGE, END)
        with client.stream("POST", CHAT, json=QUESTION | {"stream": True, "model": "writer"}) as streamed:
            [piece, done] = events(streamed)
        assert (piece["model"], piece["choices"][0]["delta"]["content"], done) == ("writer", "half", "[DONE]")
        upstream.script = answer({"error": {"message": "model `m` takes no such thing"}}, 400)
        refused = client.post(CHAT, json=QUESTION | {"model": "writer"})
        assert "writer" in error(refused, 400, "engine_refused")["message"]
        assert "`m`" not in refused.text


def test_arms_share_no_cached_answer(service: Service) -> None:
    greedy = {"temperature": 0, "messages": [{"role": "user", "content": "only here"}]}
    seen = []
    for arm, nth in (("control", 0), ("candidate", 0), ("control", 1), ("candidate", 1)):
        with client_of(service, of_arm(arm, nth)) as client:  # type: ignore[arg-type]
            seen.append(ask(service, client, **greedy)[0].headers["x-llm-cache"])
    assert seen == ["miss", "miss", "hit", "hit"]


def test_a_candidate_that_is_away_gives_way_to_the_control(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = of_arm("candidate", 2)
    service.engines["support-8"].kill()
    try:
        with client_of(service, subject) as client:
            intent = eventually("the control answers", lambda: answered(service, client))
            assert intent["gen_ai.request.model"] == "support-7"
            assert (intent["llmkeep.experiment.arm"], intent["llmkeep.experiment.away"]) == (
                "candidate",
                "down",
            )
            unit = SUPPORT.assign(who(subject), "").unit
            kept = eventually("it is kept", lambda: [e for e in assigned(service) if e["user.id"] == subject])
            assert all(
                each["llmkeep.experiment.away"]
                for each in kept
                if each["transaction.id"] == intent["transaction.id"]
            )
            assert unit not in {each["unit"] for each in told(capsys, service.folder / "journal")}
            service.engines["support-7"].kill()
            refused = eventually("no arm is there", lambda: unanswered(client))
            assert "'support'" in error(refused, 503, "engine_unavailable")["message"]
            assert "support-" not in refused.text
    finally:
        for name in "support-7", "support-8":
            service.engines[name].kill()
            service.start_engine(name)
        arms: tuple[Arm, ...] = ("control", "candidate")
        for arm in arms:
            with client_of(service, of_arm(arm)) as client:
                eventually(f"the {arm} is back", partial(back, service, client, arm))


def answered(service: Service, client: httpx.Client) -> dict[str, Any] | None:
    given, intent = ask(service, client)
    return intent if given.status_code == 200 else None


def unanswered(client: httpx.Client) -> httpx.Response | None:
    given = client.post(CHAT, json=QUESTION)
    return given if given.status_code == 503 else None


def back(service: Service, client: httpx.Client, arm: Arm) -> bool:
    given, intent = ask(service, client)
    return given.status_code == 200 and intent["gen_ai.request.model"] == getattr(SUPPORT, arm)


def test_a_tenant_that_takes_no_part_is_not_assigned(service: Service) -> None:
    with client_of(service, of_arm("candidate"), "other") as client:
        assert "'support-7'" in error(client.post(CHAT, json=QUESTION), 404, "model_not_found")["message"]
        given, intent = ask(service, client, model="support-7")
        assert given.json()["model"] == intent["gen_ai.request.model"] == "support-7"
        assert not any(name.startswith("llmkeep.experiment") for name in intent)


def test_embeddings_are_not_assigned(service: Service) -> None:
    with service.client() as client:
        refused = client.post("/v1/embeddings", json={"model": "support", "input": "x"})
        assert "'support-7'" in error(refused, 404, "model_not_found")["message"]


def test_without_experiments_in_policy_nothing_is_assigned(echo: Service, client: httpx.Client) -> None:
    given = client.post(CHAT, json=QUESTION | {"model": "echo"})
    assert given.json()["system_fingerprint"] != "fp_undisclosed"
    assert not any(name.startswith("llmkeep.experiment") for each in echo.records() for name in each)


def test_ratings_are_outcomes_of_their_arm_until_their_subject_is_forgotten(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, units = service.folder / "journal", {}
    for arm, ratings in (("control", ["up", "down"]), ("candidate", ["up"])):
        subject = of_arm(arm, 3)  # type: ignore[arg-type]
        units[arm] = SUPPORT.assign(who(subject), "").unit
        with client_of(service, subject) as client:
            identifier = client.post(CHAT, json=QUESTION).headers["x-llm-response-id"]
            for thumb in ratings:
                body = {"id": identifier, "thumb": thumb, "correction": "other"}
                assert client.post("/v1/feedback", json=body).status_code == 200
    theirs = set(units.values())
    outcomes = [each for each in told(capsys, folder) if each["unit"] in theirs]
    seen = {(each["arm"], each["unit"], each.get("metric"), each.get("value")) for each in outcomes}
    assert seen == {
        (arm, unit, metric, value)
        for arm, unit in units.items()
        for metric, value in ((None, None), ("thumb", float(arm == "candidate")), ("corrected", 1.0))
    }, "the last rating of an exchange counts, and a correction whose text is not kept"
    file = tmp_path / "outcomes.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in outcomes))
    read_back = authority.outcomes.read(file, as_declared())[50]
    assert read_back.values["thumb", "candidate"] == {units["candidate"]: (1, 1.0)}
    assert {arm for arms in read_back.arms.values() for arm in arms} == {"control", "candidate"}
    gone = ["--subject", of_arm("candidate", 3), "--tenant", "research", "--folder", str(folder)]
    assert main(["feedback", "forget", *gone]) == 0
    assert "0 are left" in capsys.readouterr().out
    left = {each["unit"] for each in told(capsys, folder)}
    assert units["control"] in left
    assert units["candidate"] not in left


def test_a_run_is_told_by_its_id_to_an_end_that_counts_its_lines(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = service.folder / "journal"
    with client_of(service, of_arm("control", 4)) as client:
        ask(service, client)
    newest = told(capsys, folder)
    assert newest
    assert told(capsys, folder, "--of-run", SUPPORT.id) == [*newest, {"lines": len(newest)}]
    assert told(capsys, folder, "--of-run", identifier("support-12", "another salt")) == [{"lines": 0}]


def as_declared() -> authority.definition.Experiment:
    """The experiment, as the control node has it."""
    metrics = [authority.definition.Metric(name, "higher", 0.1) for name in ("thumb", "corrected")]
    return authority.definition.Experiment(
        **{name: getattr(SUPPORT, name) for name in ("name", "model", "control", "candidate", "unit")},
        tenants=("research",),
        ladder=(50, 100),
        days=1,
        minimum=30,
        metrics=tuple(metrics),
        expects=authority.definition.Expects(1000, 1, 1, 1, 0.2),
    )


def test_assignments_survive_a_gateway_that_is_killed(service: Service) -> None:
    with client_of(service, of_arm("control", 4)) as client:
        client.post(CHAT, json=QUESTION)
        kept = eventually("it is kept", lambda: len(assigned(service)))
        assert service.gateway
        os.kill(service.gateway.process.pid, signal.SIGKILL)
        service.gateway.ended()
        assert len(assigned(service)) >= kept
        service.start_gateway()
        intent = eventually("it answers again", lambda: answered(service, client))
        assert intent["llmkeep.experiment.arm"] == "control", "as before the restart"


def test_stars_and_steps_without_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kept(number: int, percent: int) -> dict[str, Any]:
        names = {"name": "support-12", "arm": "candidate", "percent": percent, "unit": f"u{number}"}
        return {"transaction.id": str(number)} | {f"llmkeep.experiment.{name}": names[name] for name in names}

    records = [("assigned", kept(number, percent)) for number, percent in enumerate((5, 100, 0))]
    records += [("rated", {"transaction.id": str(n), "llmkeep.feedback.stars": 4}) for n in range(3)]
    journal.append(tmp_path, records)
    found = told(capsys, tmp_path, "--metrics", "stars")
    assert found == [
        {"unit": "u0", "arm": "candidate", "percent": 5},
        {"unit": "u0", "arm": "candidate", "percent": 5, "rater": "u0", "metric": "stars", "value": 0.75},
    ]
