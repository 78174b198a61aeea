"""Decisions of the policy: how the gateway acts on each of them, and without one."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from questions import error
from routes import every_route
from scripted_opa import ALLOWED, DENIED, MISBEHAVIOUR, ScriptedOpa, answer
from service import Service, eventually, running

from llmserve.access.policy import ALLOWED_SECONDS

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/search"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/feedback"),
    ("DELETE", "/v1/feedback"),
    ("GET", "/generate"),
    ("POST", "/generate"),
    ("GET", "/v1/collections"),
    ("GET", "/v1/collections/echo"),
    ("POST", "/v1/collections/echo"),
    ("DELETE", "/v1/collections/echo"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/echo"),
    ("GET", "/v1/usage"),
    ("GET", "/openapi.json"),
]
PUBLIC = {"/livez", "/readyz", "/health", "/drainz"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "echo", "messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"model": "echo", "input": "x"},
    "/v1/completions": {"model": "echo", "prompt": "x"},
    "/v1/embeddings": {"model": "echo", "input": "x"},
    "/v1/search": {"query": "x", "collections": ["handbook"]},
    "/v1/collections/echo": {},
    "/v1/feedback": {"id": "x", "thumb": "up"},
    "/generate": {"prompt": "x"},
}


def request(client: httpx.Client, method: str, path: str) -> httpx.Response:
    """A valid request for a route."""
    if method == "POST":
        return client.post(path, json=BODIES[path])
    return client.request(method, path, params={"prompt": "x"} if path == "/generate" else None)


@pytest.fixture(scope="module", autouse=True)
def first_revision() -> Iterator[None]:
    """A gateway takes no older revision, so tests raise the decisions' here; other files have the first one."""
    before = ALLOWED["revision"], DENIED["revision"]
    yield
    ALLOWED["revision"], DENIED["revision"] = before


@pytest.fixture(scope="module")
def opa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedOpa]:
    """A fake OPA, which each test leaves as it found it."""
    opa = ScriptedOpa(tmp_path_factory.mktemp("opa") / "opa.sock")
    yield opa
    opa.stop()


@pytest.fixture(scope="module")
def guarded(opa: ScriptedOpa, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that uses the fake."""
    folder = tmp_path_factory.mktemp("guarded")
    with running(folder, policy={"engine": "server", "socket": str(opa.socket)}) as service:
        yield service


@pytest.fixture(autouse=True)
def well_behaved(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, make the fake answer again and wait until the gateway has noticed."""
    yield
    if "opa" in request.fixturenames:
        opa: ScriptedOpa = request.getfixturevalue("opa")
        opa.server.reply, opa.server.delay, opa.server.hang_up = answer(), 0.0, False
        if "guarded" in request.fixturenames:
            guarded: Service = request.getfixturevalue("guarded")
            with guarded.client() as client:
                eventually("served again", lambda: client.get("/v1/models").status_code == 200, 5)


def forget(service: Service, client: httpx.Client, status: int) -> None:
    """Wait until cached decisions have expired."""
    eventually(f"{status}", lambda: client.get("/v1/models").status_code == status, 7)


@pytest.mark.parametrize("what", MISBEHAVIOUR)
def test_an_invalid_decision_denies_every_request(opa: ScriptedOpa, guarded: Service, what: str) -> None:
    before = guarded.metrics()['llm_tokens_total{kind="completion",model="echo"}']
    opa.server.reply = MISBEHAVIOUR[what]
    with guarded.client() as client:
        forget(guarded, client, 503)
        for method, path in ROUTES:
            error(request(client, method, path), 503, "policy_unavailable")
        assert guarded.metrics()['llm_tokens_total{kind="completion",model="echo"}'] == before
        assert "the policy is unavailable" in error(client.get("/readyz"), 503, "not_ready")["message"]


def test_a_slow_policy_engine_denies_every_request_within_the_deadline(
    tmp_path: Path,
) -> None:
    slow = ScriptedOpa(tmp_path / "opa.sock")
    slow.server.delay = 60.0
    policy = {"engine": "server", "socket": str(slow.socket), "deadline_ms": 400}
    with running(tmp_path, policy=policy) as service, service.client() as client:
        before = time.monotonic()
        error(client.get("/generate?prompt=x"), 503, "policy_unavailable")
        assert time.monotonic() - before < 20, "it waited for OPA rather than the deadline"
        assert "no decision within 400 ms" in service.logs()
    slow.stop()


def test_a_policy_engine_that_hangs_up_denies_every_request(opa: ScriptedOpa, guarded: Service) -> None:
    opa.server.hang_up = True
    with guarded.client() as client:
        forget(guarded, client, 503)
        error(client.get("/generate?prompt=x"), 503, "policy_unavailable")


def test_connections_to_the_policy_engine_are_reused(opa: ScriptedOpa, guarded: Service) -> None:
    with guarded.client() as client:
        assert client.get("/v1/models").status_code == 200
    questions, connections = len(opa.server.questions), opa.server.connections
    eventually("ten more requests to OPA", lambda: len(opa.server.questions) >= questions + 10)
    assert opa.server.connections - connections <= 1


def test_a_policy_engine_that_is_down_denies_every_request_and_is_found_again_within_five_seconds(
    opa: ScriptedOpa, guarded: Service
) -> None:
    opa.stop()
    try:
        with guarded.client() as client:
            forget(guarded, client, 503)
            for method, path in ROUTES:
                error(request(client, method, path), 503, "policy_unavailable")
            opa.start()
            eventually("served again", lambda: request(client, "GET", "/generate").status_code == 200, 5)
    finally:
        if not opa.socket.exists():
            opa.start()


def test_these_tests_cover_every_route_of_the_gateway(tmp_path: Path) -> None:
    table = {(method, each.path) for each in every_route(tmp_path) for method in each.methods}
    ours = {(method, path.replace("/echo", "/")) for method, path in ROUTES}
    assert table == ours | {("GET", path) for path in PUBLIC}


def test_every_route_that_is_not_public_is_subject_to_the_policy(opa: ScriptedOpa, guarded: Service) -> None:
    opa.server.reply = 200, json.dumps({"result": DENIED}).encode()
    with guarded.client() as client:
        forget(guarded, client, 403)
        for method, path in ROUTES:
            refused = error(request(client, method, path), 403, "denied")
            assert "default_deny" in refused["message"]
            assert refused["type"] == "permission_error"
        assert {client.get(path).status_code for path in PUBLIC} == {200}
    actions = {query["action"] for query in opa.queries()}
    assert actions >= {f"{method} {path.replace('/echo', '/*')}" for method, path in ROUTES}


def test_the_policy_sees_the_caller_and_never_the_prompt(opa: ScriptedOpa, guarded: Service) -> None:
    with guarded.client() as client:
        client.get("/generate", params={"prompt": "canary-in-a-prompt"})
    assert {
        "subject": "ada",
        "tenant": "research",
        "roles": ["developer"],
        "groups": [],
        "action": "GET /generate",
    } in opa.queries()
    assert "canary" not in json.dumps(opa.server.questions)


def test_a_decision_is_cached_until_a_new_revision(opa: ScriptedOpa, guarded: Service) -> None:
    with guarded.client() as client:
        client.get("/v1/models")
        before, begun = len(opa.queries()), time.monotonic()
        for _ in range(20):
            assert client.get("/v1/models").status_code == 200
        assert len(opa.queries()) - before <= 1 + (time.monotonic() - begun) / ALLOWED_SECONDS
        opa.server.reply = 200, json.dumps({"result": {**DENIED, "revision": 8}}).encode()
        eventually("the new revision is active", lambda: client.get("/v1/models").status_code == 403, 3)
        opa.server.reply = answer(revision=7)
        forget(guarded, client, 503)
        opa.server.reply = answer(revision=8)
        eventually("the newer one is active again", lambda: client.get("/v1/models").status_code == 200, 5)
        ALLOWED["revision"] = DENIED["revision"] = 8  # for the following tests


def test_the_highest_revision_survives_a_restart(tmp_path: Path) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    policy = {"engine": "server", "socket": str(opa.socket), "seen": str(tmp_path / "revision")}
    opa.server.reply = answer(revision=30)
    with running(tmp_path, policy=policy) as service, service.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert service.gateway is not None
        service.gateway.stop()
        opa.server.reply = answer(revision=29)
        service.start_gateway()
        error(client.get("/v1/models"), 503, "policy_unavailable")
    opa.stop()


def test_a_revision_that_cannot_be_stored_is_not_used(tmp_path: Path) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    policy = {"engine": "server", "socket": str(opa.socket), "seen": str(tmp_path / "state/revision")}
    with running(tmp_path, policy=policy) as service, service.client() as client:
        error(client.get("/v1/models"), 503, "policy_unavailable")
        assert "cannot be stored" in service.logs()
        (tmp_path / "state").mkdir()
        eventually("served", lambda: client.get("/v1/models").status_code == 200, 5)
        assert service.gateway is not None
        service.gateway.stop()
        (tmp_path / "state/revision").write_text("seven\n")
        service.start_gateway(wait=False)
        assert service.gateway.process.wait(20) == 2
        assert "'seven' instead of the highest policy revision" in service.logs()
    opa.stop()


def test_a_new_revision_that_denies_ends_a_running_stream(opa: ScriptedOpa, tmp_path: Path) -> None:
    models = {"echo": {"driver": "echo", "token_seconds": 0.05}}
    policy = {"engine": "server", "socket": str(opa.socket)}
    with running(tmp_path, models, policy=policy) as service, service.client() as client:
        body = {**BODIES["/v1/chat/completions"], "stream": True, "max_tokens": 200}
        body["messages"] = [{"role": "user", "content": "word " * 200}]
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            revision = ALLOWED["revision"] = DENIED["revision"] = ALLOWED["revision"] + 1
            opa.server.reply = 200, json.dumps({"result": {**DENIED, "revision": revision}}).encode()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "denied"


def test_a_decision_names_the_models_and_the_length(opa: ScriptedOpa, tmp_path: Path) -> None:
    models = {"echo": {"driver": "echo"}, "secret": {"driver": "echo"}}
    opa.server.reply = answer(models=["echo"], max_tokens=5)
    with (
        running(tmp_path, models, policy={"engine": "server", "socket": str(opa.socket)}) as service,
        service.client() as client,
    ):
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["echo"]
        absent = error(client.get("/v1/models/nothing"), 404, "model_not_found")["message"]
        hidden = error(client.get("/v1/models/secret"), 404, "model_not_found")["message"]
        assert hidden == absent.replace("nothing", "secret"), (
            "a hidden model can be distinguished from one that does not exist"
        )
        hidden_chat = {**BODIES["/v1/chat/completions"], "model": "secret"}
        error(client.post("/v1/chat/completions", json=hidden_chat), 404, "model_not_found")
        chat = BODIES["/v1/chat/completions"]
        long = error(
            client.post("/v1/chat/completions", json={**chat, "max_tokens": 6}), 400, "invalid_value"
        )
        assert "the limit is 5" in long["message"]
        words = {**chat, "messages": [{"role": "user", "content": "a b c d e f g h"}]}
        assert client.post("/v1/chat/completions", json=words).json()["usage"]["completion_tokens"] == 5
        assert "secret" not in client.get("/readyz").text


def test_a_rate_is_counted_by_subject(opa: ScriptedOpa, tmp_path: Path) -> None:
    rate = {**ALLOWED["rate"], "requests_per_minute": 12}
    opa.server.reply = answer(rate=rate)
    with running(tmp_path, policy={"engine": "server", "socket": str(opa.socket)}) as service:
        other = service.add_key("eve", "research")["key"]
        with service.client() as ada, service.client(other) as eve:
            codes = [ada.get("/v1/models").status_code for _ in range(8)]
            refused = error(ada.get("/v1/models"), 429, "rate_limited") if 429 not in codes else None
            assert codes[0] == 200
            assert 429 in codes or refused
            assert eventually("eve is served", lambda: eve.get("/v1/models").status_code == 200)
