"""The tree's own signed policy: the same decisions from the embedded engine and the real OPA, and invalid bundles."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from authority import KEY, PUBLIC_KEY, ROOT, packed, programs, signed_bundle
from cryptography.hazmat.primitives.asymmetric import ec
from questions import error
from service import Service, eventually, running

from llmproof.policy_bundle import SIGNATURES, unpacked
from llmserve.access.break_glass import AUDIENCE
from llmserve.local_run import free_port

OTHER_KEY = ec.generate_private_key(ec.SECP256R1())


def opa_program() -> str:
    """Path of the real OPA; skips without it."""
    found = programs.find("opa")
    if found is None:
        pytest.skip("no OPA program is available")
    return str(found)


@contextmanager
def real_opa(folder: Path) -> Iterator[dict[str, Any]]:
    """Run OPA with folder/bundle.tar.gz as the role opa does; yields the gateway's configuration for it."""
    with free_port() as port, opa_on(folder, port) as policy:
        yield policy


@contextmanager
def opa_on(folder: Path, port: int) -> Iterator[dict[str, Any]]:
    """The same, with the bundle's server on this port."""
    program, role = opa_program(), ROOT / "roles/opa/files"
    sockets = Path(tempfile.mkdtemp(prefix="opa-"))
    resource = {"service": "host", "resource": "bundle.tar.gz", "signing": {"keyid": "policy"}}
    configuration = {
        "services": {"host": {"url": f"http://127.0.0.1:{port}"}},
        "bundles": {"llm": {**resource, "polling": {"min_delay_seconds": 1, "max_delay_seconds": 1}}},
        "keys": {"policy": {"algorithm": "ES256", "key": (folder / "policy.pem").read_text()}},
    }
    (folder / "opa.yaml").write_text(yaml.safe_dump(configuration))
    options = ["--addr", f"unix://{sockets}/opa.sock", "--config-file", str(folder / "opa.yaml")]
    options += ["--authorization=basic", "--skip-version-check", str(role / "authz.rego")]
    with (folder / "opa.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, str(role / "serve_policy.py"), str(folder / "bundle.tar.gz"), str(port)]
        )
        opa = subprocess.Popen([program, "run", "--server", *options], stdout=log, stderr=log)
    try:
        eventually("OPA listens", (sockets / "opa.sock").exists)
        yield {"engine": "server", "socket": str(sockets / "opa.sock")}
    finally:
        for process in opa, server:
            process.terminate()
            process.wait(10)


@pytest.fixture(params=["embedded", "server"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """A service with the signed bundle, once with the embedded engine and once with OPA."""
    (tmp_path / "policy.pem").write_bytes(PUBLIC_KEY)
    (tmp_path / "bundle.tar.gz").write_bytes(signed_bundle(5))
    if request.param == "embedded":
        with running(
            tmp_path, policy={"engine": "embedded", "bundle": str(tmp_path / "bundle.tar.gz")}
        ) as service:
            yield service
    else:
        with real_opa(tmp_path) as policy, running(tmp_path, policy=policy) as service:
            eventually("OPA has the bundle", lambda: revision(service) == 5)
            yield service


def replace(service: Service, bundle: bytes) -> None:
    """Replace the bundle atomically."""
    aside = service.folder / "bundle.new"
    aside.write_bytes(bundle)
    aside.rename(service.folder / "bundle.tar.gz")


def revision(service: Service) -> float:
    """The active revision, from the metrics."""
    return service.metrics()["llm_policy_revision"]


def resigned(change: Callable[[dict[str, bytes]], None]) -> bytes:
    """A bundle of revision 6 whose files were changed after signing."""
    files = unpacked(signed_bundle(6))
    change(files)
    return packed(files)


def strip(files: dict[str, bytes]) -> None:
    """Remove its signature."""
    del files[SIGNATURES]


def allow_all(files: dict[str, bytes]) -> None:
    """Make its rule allow everything."""
    rule = (
        b"package llm.authz\n\nimport rego.v1\n\ndecision := " + json.dumps({"allow": True}).encode() + b"\n"
    )
    files["llm/authz/authz.rego"] = rule


def flip(files: dict[str, bytes]) -> None:
    """Flip one bit of its data."""
    name = "llm/roles/data.json"
    files[name] = files[name].replace(b"analyst", b"analysu", 1)


BAD: dict[str, Callable[[], bytes]] = {
    "no signature": lambda: resigned(strip),
    "a foreign signature": lambda: signed_bundle(6, OTHER_KEY),
    "a rule that allows all": lambda: resigned(allow_all),
    "one flipped bit": lambda: resigned(flip),
    "half of a file": lambda: signed_bundle(6)[:500],
    "nothing": lambda: b"",
}


def test_the_metrics_name_the_engine_that_decides(request: pytest.FixtureRequest, service: Service) -> None:
    declared = request.node.callspec.params["service"]
    named = {name for name in service.metrics() if name.startswith("llm_policy_engine")}
    assert named == {f'llm_policy_engine{{engine="{declared}"}}'}


def test_both_policy_engines_give_the_same_decisions(service: Service) -> None:
    expected = {
        "analyst": (200, 403, 403),
        "developer": (200, 200, 200),
        "operator": (403, 403, 200),
        "nobody": (403,) * 3,
    }
    for role, codes in expected.items():
        added = service.cli(
            "keys",
            "add",
            "--subject",
            role,
            "--tenant",
            "t",
            "--role",
            role,
            "--keys-file",
            str(service.folder / "keys.json"),
        )
        with service.client(added.stdout.strip()) as client:
            seen = (
                client.get("/generate?prompt=x").status_code,
                client.post("/generate", json={"prompt": "x"}).status_code,
                client.get("/v1/models").status_code,
            )
        assert (role, seen) == (role, codes)


def test_a_bundle_with_an_invalid_signature_is_ignored_and_a_valid_one_is_active_within_seconds(
    service: Service,
) -> None:
    with service.client() as client:
        for what, make in BAD.items():
            replace(service, make())
            eventually(f"looked at: {what}", lambda: noticed(service), 5)
            assert client.get("/v1/models").status_code == 200
            assert revision(service) == 5, what
        replace(service, signed_bundle(6))
        eventually("the valid one is active", lambda: revision(service) == 6, 5)
        assert client.get("/v1/models").status_code == 200


def test_a_restarted_gateway_reports_the_active_revision(tmp_path: Path) -> None:
    (tmp_path / "bundle.tar.gz").write_bytes(signed_bundle(5))
    policy = {
        "engine": "embedded",
        "bundle": str(tmp_path / "bundle.tar.gz"),
        "seen": str(tmp_path / "seen"),
    }
    with running(tmp_path, policy=policy) as service:
        assert service.gateway is not None
        service.gateway.stop()
        assert (tmp_path / "seen").read_text() == "5\n"
        service.start_gateway()
        eventually("the metrics report it", lambda: revision(service) == 5, 5)


def noticed(service: Service) -> bool:
    """Whether another rejection of a bundle or break-glass file was logged since the last call."""
    marks = ("a policy bundle was rejected", "Bundle load failed", "not a valid break-glass file")
    count = sum(service.logs().count(mark) for mark in marks)
    before, service.refusals = service.refusals, count
    return count > before


def test_an_older_revision_denies_everything(service: Service) -> None:
    with service.client() as client:
        replace(service, signed_bundle(4))
        if service.policy and service.policy["engine"] == "embedded":
            eventually("refused", lambda: "older than 5" in service.logs(), 5)
            assert client.get("/v1/models").status_code == 200
        else:
            eventually("everything is denied", lambda: client.get("/v1/models").status_code == 503, 8)
        replace(service, signed_bundle(7))
        eventually("requests are allowed again", lambda: client.get("/v1/models").status_code == 200, 8)


def test_an_expired_policy_denies_everything(service: Service) -> None:
    with service.client() as client:
        replace(service, signed_bundle(6, lifetime=timedelta(seconds=6)))
        eventually("it is active", lambda: revision(service) == 6, 5)
        eventually("it has expired", lambda: client.get("/v1/models").status_code == 503, 12)
        error(client.get("/generate?prompt=x"), 503, "policy_unavailable")
        replace(service, signed_bundle(7))
        eventually("requests are allowed again", lambda: client.get("/v1/models").status_code == 200, 8)


def broken_glass(key: ec.EllipticCurvePrivateKey = KEY, **changes: Any) -> str:
    """A break-glass file for ada."""
    now = datetime.now(UTC)
    claims = {
        "aud": AUDIENCE,
        "sub": "ada",
        "tenant": "research",
        "iat": now,
        "exp": now + timedelta(hours=1),
        "reason": "incident 4711",
        "actions": ["GET /generate"],
    }
    return jwt.encode({**claims, **changes}, key, algorithm="ES256", headers={"kid": "policy"})


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose policy engine is down."""
    folder = tmp_path_factory.mktemp("closed")
    policy = {
        "engine": "server",
        "socket": str(folder / "none.sock"),
        "break_glass": str(folder / "glass.jwt"),
    }
    with running(folder, policy=policy) as service:
        yield service


def test_break_glass_allows_its_subject_its_actions_and_logs_an_error(closed: Service) -> None:
    others = [closed.add_key(*who)["key"] for who in (("eve", "research"), ("ada", "sales"))]
    with closed.client() as ada, closed.client(others[0]) as eve, closed.client(others[1]) as namesake:
        error(ada.get("/generate?prompt=x"), 503, "policy_unavailable")
        (closed.folder / "glass.jwt").write_text(broken_glass())
        answered = eventually(
            "it is allowed", lambda: (got := ada.get("/generate?prompt=x")).status_code == 200 and got
        )
        error(ada.post("/generate", json={"prompt": "x"}), 503, "policy_unavailable")
        error(eve.get("/generate?prompt=x"), 503, "policy_unavailable")
        error(namesake.get("/generate?prompt=x"), 503, "policy_unavailable")
        assert closed.metrics()["llm_break_glass_total"] >= 1
        assert "incident 4711" in closed.logs()
        records = [
            each
            for each in closed.records()
            if each.get("http.request.id") == answered.headers["x-request-id"]
        ]
        assert {each["llmkeep.decision.rule"] for each in records} == {"break_glass"}
        (closed.folder / "glass.jwt").write_text(broken_glass(models=["another"]))
        eventually("another model only", lambda: ada.get("/generate?prompt=x").status_code == 404)
        (closed.folder / "glass.jwt").unlink()
        error(ada.get("/generate?prompt=x"), 503, "policy_unavailable")


@pytest.mark.parametrize(
    "made",
    [
        lambda: broken_glass(OTHER_KEY),
        lambda: broken_glass(exp=datetime.now(UTC) - timedelta(seconds=1)),
        lambda: broken_glass(exp=datetime.now(UTC) + timedelta(hours=5)),
        lambda: broken_glass(aud="something else"),
        lambda: broken_glass(tenant=None),
        lambda: broken_glass(models="echo"),
        lambda: broken_glass(reason=""),
        lambda: broken_glass(actions="GET /generate"),
        lambda: jwt.encode({"aud": AUDIENCE, "sub": "ada"}, "", algorithm="none"),
        lambda: "no token",
    ],
    ids=[
        "foreign",
        "expired",
        "too long",
        "for something else",
        "no tenant",
        "models that are not a list",
        "no reason",
        "no actions",
        "unsigned",
        "garbage",
    ],
)
def test_an_invalid_break_glass_file_allows_nothing(closed: Service, made: Callable[[], str]) -> None:
    (closed.folder / "glass.jwt").write_text(made())
    with closed.client() as client:
        eventually("the rejection is logged", lambda: noticed(closed))
        error(client.get("/generate?prompt=x"), 503, "policy_unavailable")


def test_break_glass_does_not_override_a_denial(tmp_path: Path) -> None:
    (tmp_path / "policy.pem").write_bytes(PUBLIC_KEY)
    (tmp_path / "bundle.tar.gz").write_bytes(signed_bundle(5))
    (tmp_path / "glass.jwt").write_text(broken_glass(sub="eve", tenant="t"))
    policy = {
        "engine": "embedded",
        "bundle": str(tmp_path / "bundle.tar.gz"),
        "break_glass": str(tmp_path / "glass.jwt"),
    }
    with running(tmp_path, policy=policy) as service:
        key = service.cli(
            "keys",
            "add",
            "--subject",
            "eve",
            "--tenant",
            "t",
            "--role",
            "auditor",
            "--keys-file",
            str(tmp_path / "keys.json"),
        ).stdout.strip()
        with service.client(key) as client:
            error(client.get("/generate?prompt=x"), 403, "denied")
