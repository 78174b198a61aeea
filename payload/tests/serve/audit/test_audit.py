"""The audit record as written by the gateway: before, after, and instead of an answer."""

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from questions import STREAM, error
from scripted_opa import ALLOWED, ScriptedOpa, answer
from service import Service, eventually, running

from llmserve.api.errors import ApiError
from llmserve.audit.writer_client import INTENT_SECONDS, KEPT, AuditClient
from llmserve.metrics import Metrics

CHAT = "/v1/chat/completions"
CANARY = "canary-4711-in-a-prompt"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose writer may be killed."""
    with running(tmp_path_factory.mktemp("audited")) as service:
        yield service


def of_request(service: Service, answered: httpx.Response, number: int = 2) -> list[dict[str, Any]]:
    """The records of one request, once there are `number` of them."""

    def found() -> list[dict[str, Any]] | None:
        identifier = answered.headers["x-request-id"]
        records = [each for each in service.records() if each.get("http.request.id") == identifier]
        return records if len(records) >= number else None

    records: list[dict[str, Any]] = eventually(f"{number} records", found)
    return records


def test_an_answer_has_an_intent_and_an_outcome(service: Service) -> None:
    with service.client() as client:
        answered = client.get("/generate", params={"prompt": "one two three"})
    intent, outcome = of_request(service, answered)
    assert intent["llmkeep.audit.phase"] == "intent"
    assert intent["event.outcome"] == "unknown"
    assert outcome["llmkeep.audit.phase"] == "outcome"
    assert outcome["event.outcome"] == "success"
    for record in intent, outcome:
        assert record["event.action"] == "GET /generate"
        assert (record["user.id"], record["organization.id"]) == ("ada", "research")
        assert record["llmkeep.decision.rule"].startswith("roles/")
        assert record["llmkeep.decision.revision"] >= 1
    assert intent["gen_ai.request.model"] == "echo"
    assert outcome["gen_ai.usage.output_tokens"] == 3
    assert outcome["http.response.status_code"] == 200
    assert outcome["event.duration"] > 0


def test_the_same_prompt_has_the_same_hash_and_another_prompt_another(service: Service) -> None:
    with service.client() as client:
        first, again, other = (
            of_request(service, client.get("/generate", params={"prompt": prompt}))[0]["llmkeep.prompt.hmac"]
            for prompt in ("same", "same", "other")
        )
    assert first == again != other


def test_a_stream_has_an_outcome_with_its_tokens(service: Service) -> None:
    with service.client() as client, client.stream("POST", CHAT, json=STREAM) as answered:
        answered.read()
    outcome = of_request(service, answered)[1]
    assert outcome["event.outcome"] == "success"
    assert outcome["gen_ai.usage.output_tokens"] > 0


def test_an_abandoned_stream_has_an_outcome(tmp_path: Path) -> None:
    models = {"echo": {"driver": "echo", "token_seconds": 0.05}}
    with running(tmp_path, models) as service, service.client() as client:
        with client.stream("POST", CHAT, json={**STREAM, "max_tokens": 100}) as answered:
            next(answered.iter_lines())
        assert of_request(service, answered)[1]["error.code"] == "client_gone"


def test_a_refusal_is_recorded_with_its_reason(service: Service) -> None:
    with service.client("llmk_000000000000_wrong") as client:
        (unknown,) = of_request(service, client.get("/v1/models"), 1)
    assert unknown["llmkeep.audit.phase"] == "refused"
    assert unknown["error.code"] == "invalid_key"
    assert "user.id" not in unknown
    with service.client(service.add_key("eve", "research", "--role", "unassigned")["key"]) as client:
        (denied,) = of_request(service, client.get("/v1/models"), 1)
    assert (denied["error.code"], denied["user.id"]) == ("denied", "eve")
    assert denied["llmkeep.decision.rule"] == "unknown_role"


def test_a_model_that_policy_hides_is_on_record_and_one_that_does_not_exist_without_its_name(
    tmp_path: Path,
) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    opa.server.reply = answer(models=["other"])
    models = {"echo": {"driver": "echo"}, "other": {"driver": "echo"}}
    with (
        running(tmp_path, models, policy={"engine": "server", "socket": str(opa.socket)}) as service,
        service.client() as client,
    ):
        question = {"messages": [{"role": "user", "content": "x"}]}
        hidden = client.post(CHAT, json={"model": "echo", **question})
        unknown = client.post(CHAT, json={"model": CANARY, **question})
        assert error(hidden, 404, "model_not_found").keys() == error(unknown, 404, "model_not_found").keys()
        assert "x-llm-model" not in hidden.headers
        (refused,) = of_request(service, hidden, 1)
        assert (refused["llmkeep.audit.phase"], refused["user.id"]) == ("refused", "ada")
        assert (refused["error.code"], refused["gen_ai.request.model"]) == ("model_not_found", "echo")
        assert CANARY not in json.dumps(of_request(service, unknown, 1))
    opa.stop()


def test_public_routes_leave_no_record(service: Service) -> None:
    before = len(service.records())
    with service.client("") as client:
        for _ in range(5):
            client.get("/livez")
            client.get("/readyz")
    time.sleep(0.3)
    assert len(service.records()) == before


def test_the_record_has_the_prompt_only_if_the_policy_says_so_and_then_redacted(tmp_path: Path) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    opa.server.reply = answer(log_prompt=True)
    prompt = f"{CANARY}, write to ada@example.org"
    with (
        running(tmp_path, policy={"engine": "server", "socket": str(opa.socket)}) as service,
        service.client() as client,
    ):
        logged = of_request(service, client.get("/generate", params={"prompt": prompt}))[0]
        assert logged["llmkeep.prompt.text"] == f"{CANARY}, write to [address]"
        opa.server.reply = answer(log_prompt=False, revision=99)
        eventually("the new revision is active", lambda: service.metrics()["llm_policy_revision"] == 99)
        silent = of_request(service, client.get("/generate", params={"prompt": prompt}))
        assert CANARY not in json.dumps(silent)
    opa.stop()


def test_without_a_writer_nothing_is_answered_until_at_most_five_seconds_after_its_return(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as service, service.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert service.writer is not None
        service.writer.kill()
        eventually("requests are refused", lambda: client.get("/v1/models").status_code == 503)
        tokens = service.metrics()['llm_tokens_total{kind="completion",model="echo"}']
        for path in "/generate?prompt=x", "/v1/models", "/openapi.json":
            error(client.get(path), 503, "audit_unavailable")
        assert "audit writer" in error(client.get("/readyz"), 503, "not_ready")["message"]
        assert service.metrics()['llm_tokens_total{kind="completion",model="echo"}'] == tokens
        service.start_writer()
        eventually("served again", lambda: client.get("/generate?prompt=x").status_code == 200, 5)


def test_while_the_writer_hangs_requests_are_refused_in_bounded_time(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        assert service.writer is not None
        tokens = service.metrics()['llm_tokens_total{kind="completion",model="echo"}']
        service.writer.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        error(client.get("/generate?prompt=x"), 503, "audit_unavailable")
        assert time.monotonic() - began < INTENT_SECONDS + 15
        assert service.metrics()['llm_tokens_total{kind="completion",model="echo"}'] == tokens
        service.writer.process.send_signal(signal.SIGCONT)
        assert client.get("/generate?prompt=x").status_code == 200


def test_a_record_that_does_not_reach_the_disk_in_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        client = AuditClient(tmp_path / "none", Metrics())
        began = time.monotonic()
        recording = asyncio.create_task(client.record({}))
        await asyncio.sleep(0)
        for waited, over in (INTENT_SECONDS - 0.5, False), (INTENT_SECONDS + 0.5, True):
            with monkeypatch.context() as later:
                later.setattr("llmserve.audit.writer_client.time.monotonic", lambda now=began + waited: now)
                client.end_overdue()
            await asyncio.sleep(0)
            assert bool(client.waiting) is not over
        with pytest.raises(ApiError, match="audit_unavailable"):
            await recording

    asyncio.run(scenario())


def no_delays(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[], float]) -> None:
    """Let a client reconnect at once, with `seconds` as its clock."""
    monkeypatch.setattr("llmserve.audit.writer_client.RETRY_SECONDS", 0)
    monkeypatch.setattr("llmserve.audit.writer_client.time", SimpleNamespace(monotonic=seconds))


def test_a_writer_that_starts_late_or_restarts_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_delays(monkeypatch, lambda: 0.0)

    async def connect_and_stop(client: AuditClient) -> None:
        connections: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_unix_server(
            lambda _, writer: connections.put_nowait(writer), client.socket
        )
        connection = await connections.get()
        server.close()
        client.socket.unlink(missing_ok=True)
        connection.close()
        while client.up:
            await asyncio.sleep(0)

    async def scenario() -> None:
        client = AuditClient(tmp_path / "audit.sock", Metrics())
        connecting = asyncio.create_task(client.keep_connected())
        async with asyncio.timeout(30):
            for _ in range(3):
                await asyncio.sleep(0)
                await connect_and_stop(client)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)

    asyncio.run(scenario())
    assert caplog.messages == []


@pytest.mark.parametrize("trouble", ["FileNotFoundError", "it closed the connection"])
def test_a_writer_that_stays_away_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    readings: list[float] = []

    def clock() -> float:
        readings.append(len(readings))
        return readings[-1]

    no_delays(monkeypatch, clock)

    async def scenario() -> None:
        client = AuditClient(tmp_path / "audit.sock", Metrics())
        if trouble == "it closed the connection":
            await asyncio.start_unix_server(lambda _, writer: writer.close(), client.socket)
        connecting = asyncio.create_task(client.keep_connected())
        async with asyncio.timeout(30):
            while len(readings) < 1000:
                await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)

    asyncio.run(scenario())
    assert caplog.messages == ["no audit writer: every request is rejected"]
    assert caplog.records[0].__dict__["fields"]["socket"] == str(tmp_path / "audit.sock")
    assert trouble in caplog.records[0].__dict__["fields"]["reason"]


def test_an_outcome_waits_for_a_writer_that_is_away(tmp_path: Path) -> None:
    models = {"echo": {"driver": "echo", "token_seconds": 0.05}}
    with running(tmp_path, models) as service, service.client() as client:
        assert service.writer is not None
        with client.stream("POST", CHAT, json={**STREAM, "max_tokens": 20}) as answered:
            lines = answered.iter_lines()
            next(lines)
            service.writer.kill()
            assert "data: [DONE]" in list(lines)
        service.start_writer()
        outcome = of_request(service, answered)[-1]
        assert (outcome["llmkeep.audit.phase"], outcome["event.outcome"]) == ("outcome", "success")


def test_a_flood_of_refusals_is_counted_and_delays_no_answer(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        assert service.writer is not None
        assert service.gateway is not None
        eve = service.add_key("eve", "research", "--role", "unassigned")["key"]
        with service.client(eve) as wrong, service.client() as good:
            assert good.get("/v1/models").status_code == 200
            service.writer.kill()
            for _ in range(1100):
                wrong.get("/v1/models")
            service.start_writer()
            eventually("served again", lambda: good.get("/v1/models").status_code == 200, 5)
        service.gateway.stop()
        refused = [each for each in service.records() if each["llmkeep.audit.phase"] == "refused"]
        assert sum(each.get("llmkeep.audit.count", 1) for each in refused) == 1100


def test_refusals_beyond_a_tenth_of_what_a_gateway_retains_are_only_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        client = AuditClient(tmp_path / "no.sock", Metrics())
        for _ in range(KEPT // 10 + 90):
            client.note({"event.action": "unknown"}, refusal=True)
        assert len(client.waiting) == KEPT // 10
        client.note({"event.action": "outcome"})
        assert json.loads(client.waiting[-1].line)["llmkeep.audit.suppressed"] == 90

    asyncio.run(scenario())


def test_no_log_and_no_record_contains_a_prompt_whatever_the_outcome(tmp_path: Path) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    models = {"echo": {"driver": "echo", "token_seconds": 0.05}}
    body = {**STREAM, "messages": [{"role": "user", "content": f"{CANARY} " * 100}]}
    policy = {"engine": "server", "socket": str(opa.socket)}
    with (
        running(tmp_path, models, policy=policy) as service,
        service.client() as client,
    ):

        def ask(headers: dict[str, str] | None = None, **changes: Any) -> int:
            return client.post(CHAT, json={**body, **changes}, headers=headers).status_code

        codes = {
            "answered": ask(max_tokens=1),
            "wrong": ask(temperature=9),
            "no such model": ask(model=CANARY),
            "over the context": ask(messages=[{"role": "user", "content": f"{CANARY} " * 5000}]),
            "too late": ask({"x-llm-deadline-ms": "1000"}, stream=False),
        }
        with client.stream("POST", CHAT, json=body) as left:
            next(left.iter_lines())
        opa.server.reply = answer(
            rate=ALLOWED["rate"] | {"tokens_per_minute": 1, "tokens_per_day": 1}, revision=8
        )
        eventually("the new rate is active", lambda: service.metrics()["llm_policy_revision"] == 8)
        codes["over the quota"] = ask()
        opa.server.reply = answer(allow=False, rule="default_deny", revision=9)
        eventually("the new rule is active", lambda: service.metrics()["llm_policy_revision"] == 9)
        codes["denied"] = ask()
        opa.server.reply = answer(revision=10)
        eventually("the old rule is active", lambda: service.metrics()["llm_policy_revision"] == 10)
        with client.stream("POST", CHAT, json=body) as broken:
            lines = broken.iter_lines()
            next(lines)
            service.engines["echo"].kill()
            assert "engine_lost" in "".join(lines)
        codes["no engine"] = ask()
        opa.stop()
        eventually("no policy is active", lambda: ask() == 503)
        assert service.writer is not None
        service.writer.kill()
        codes["nothing works"] = ask()
        assert codes == {
            "answered": 200,
            "wrong": 400,
            "no such model": 404,
            "over the context": 400,
            "too late": 503,
            "over the quota": 429,
            "denied": 403,
            "no engine": 503,
            "nothing works": 503,
        }
        assert service.records()
        for kept in (service.logs(), json.dumps(service.records())):
            assert CANARY not in kept
            assert service.key.split("_")[2] not in kept
