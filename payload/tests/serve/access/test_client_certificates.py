"""Client certificates through a real nginx: which ones are accepted, and attempts to forge one."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote

import httpx2 as httpx
import pytest
from edge import Edge, authority, in_front_of, issue, revoke
from questions import LASTING, error
from service import Service, eventually, running

from llmcore.config import ConfigError, load
from llmserve.access.api_keys import KeyTable, edited, read_keys
from llmserve.access.identity import Authenticator
from llmserve.api.errors import ApiError
from llmserve.settings import GatewayConfig

HEADER = {"certificate_header": "X-Client-Certificate"}
SLOW: dict[str, Any] = {"slow": {"driver": "echo", "token_seconds": 0.05}}
LONG = {**LASTING, "model": "slow"}
# What tells a browser's request for another site from its own and from a machine's, and the value that the refusal names.
FOREIGN: list[tuple[dict[str, str], str]] = [
    ({"sec-fetch-site": "cross-site"}, "'cross-site'"),
    ({"sec-fetch-site": "cross-site", "origin": "https://localhost"}, "'cross-site'"),
    ({"sec-fetch-site": "same-site", "origin": "https://other.localhost"}, "'same-site'"),
    ({"sec-fetch-site": "none", "origin": "https://elsewhere.example"}, "'https://elsewhere.example'"),
    ({"origin": "https://elsewhere.example"}, "'https://elsewhere.example'"),
    ({"origin": "http://localhost"}, "'http://localhost'"),
    ({"origin": "null"}, "'null'"),
]
OWN: list[dict[str, str]] = [
    {},
    {"sec-fetch-site": "none"},
    {"sec-fetch-site": "same-origin", "origin": "https://localhost"},
    {"sec-fetch-site": "same-origin", "origin": "null"},  # a form of a page without referrer
    {"origin": "https://localhost"},
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway that trusts its edge's certificate header."""
    models = {"echo": {"driver": "echo"}, **SLOW}
    with running(tmp_path_factory.mktemp("certificates"), models, identity=HEADER) as service:
        yield service


@pytest.fixture(scope="module")
def edge(service: Service) -> Iterator[Edge]:
    """nginx in front of it."""
    with in_front_of(service.folder / "http.sock", service.folder / "nginx") as edge:
        yield edge


def add(service: Service, certificate: Path, subject: str, *more: str) -> dict[str, object]:
    """Register the certificate with the CLI."""
    added = service.add_key(subject, "sales", "--certificate", str(certificate), *more)
    assert "key" not in added
    return added


def access_line(service: Service, request_id: str) -> dict[str, object]:
    """The gateway's access log line of one request."""

    def found() -> dict[str, object] | None:
        lines = [json.loads(line) for line in service.logs().splitlines() if request_id in line]
        return next((line for line in lines if "user.id" in line), None)

    line: dict[str, object] = eventually("it is logged", found)
    return line


def test_only_a_registered_certificate_identifies_its_holder(service: Service, edge: Edge) -> None:
    robot, other = issue(edge.clients, "robot"), issue(edge.clients, "other")
    added = add(service, robot, "robot")
    assert added["kind"] == "certificate"
    with edge.client(robot) as client:
        eventually("it works", lambda: client.get("/generate?prompt=x").status_code == 200, 5)
        answer = client.post("/generate", json={"prompt": "one two"})
        assert answer.json()["response"] == "one two"
    line = access_line(service, answer.headers["x-request-id"])
    assert (line["user.id"], line["organization.id"]) == ("robot", "sales")
    assert (line["llmkeep.identity.kind"], line["llmkeep.identity.id"]) == ("certificate", added["id"])
    with edge.client(other) as client:
        error(client.get("/v1/models"), 401, "unknown_certificate")
    with edge.client() as client:
        error(client.get("/v1/models"), 401, "missing_key")


def test_a_valid_certificate_does_not_make_up_for_an_invalid_authorization_header(
    service: Service, edge: Edge
) -> None:
    good = issue(edge.clients, "both")
    add(service, good, "both")
    with edge.client(good) as client:
        eventually("it works", lambda: client.get("/v1/models").status_code == 200, 5)
        wrong = {"authorization": service.key[:-1]}
        error(client.get("/v1/models", headers=wrong), 401, "malformed_key")
        wrong = {"authorization": f"Bearer {service.key[:-1]}{'0' if service.key[-1] != '0' else '1'}"}
        error(client.get("/v1/models", headers=wrong), 401, "invalid_key")
        right = client.get("/v1/models", headers={"authorization": f"Bearer {service.key}"})
        assert access_line(service, right.headers["x-request-id"])["user.id"] == "ada"


def test_another_site_cannot_use_the_certificate_of_a_browser(service: Service, edge: Edge) -> None:
    add(service, certificate := issue(edge.clients, "browser"), "browser")

    def answers(client: httpx.Client, headers: dict[str, str]) -> list[httpx.Response]:
        """To a picture, and to a POST that a browser sends to any site without a preflight request."""
        body = json.dumps({"model": "echo", "prompt": "planted"})
        plain = {**headers, "content-type": "text/plain"}
        return [
            client.get("/generate?prompt=planted", headers=headers),
            client.post("/v1/completions", content=body, headers=plain),
        ]

    def recorded() -> list[dict[str, Any]]:
        return [each for each in service.records() if each.get("user.id") == "browser"]

    with edge.client(certificate) as client:
        eventually("it works", lambda: client.get("/v1/models").status_code == 200, 5)
        before = len(eventually("it is recorded", lambda: len(recorded()) > 1 and recorded()))
        for headers, value in FOREIGN:
            for answer in answers(client, headers):
                assert value in error(answer, 403, "cross_site")["message"], headers
        for headers in OWN:
            assert [each.status_code for each in answers(client, headers)] == [200, 200], headers
    # Intent and outcome of each.
    after = before + 2 * 2 * len(OWN)
    eventually("only its own requests are recorded as the holder's", lambda: len(recorded()) == after)
    refused = [each for each in service.records() if each.get("error.code") == "cross_site"]
    assert {each["llmkeep.audit.phase"] for each in refused} == {"refused"}


def test_no_browser_attaches_a_key_by_itself_so_any_site_may_send_one(service: Service, edge: Edge) -> None:
    with edge.client(authorization=f"Bearer {service.key}") as client:
        for headers, _ in FOREIGN:
            assert client.get("/v1/models", headers=headers).status_code == 200, headers


def test_a_foreign_or_expired_certificate_does_not_pass_the_edge(service: Service, edge: Edge) -> None:
    stranger = issue(authority(edge.folder, "strangers"), "stranger")
    past = ["-not_before", "20250101000000Z", "-not_after", "20250102000000Z"]
    expired = issue(edge.clients, "expired", *past)
    add(service, stranger, "stranger")
    for certificate in stranger, expired:
        with edge.client(certificate) as client:
            answer = client.get("/v1/models", headers={"authorization": f"Bearer {service.key}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_certificate")
    file = ["--keys-file", str(service.folder / "keys.json"), "--tenant", "t", "--role", "r"]
    refused = service.cli("keys", "add", "--certificate", str(expired), "--subject", "late", *file)
    assert (refused.returncode, "expired" in refused.stderr) == (1, True)


def test_a_certificate_header_sent_by_a_client_is_ignored(service: Service, edge: Edge) -> None:
    victim = issue(edge.clients, "victim")
    add(service, victim, "victim")
    escaped = quote(victim.read_text(), safe="")
    names = ["X-Client-Certificate", "x-client-certificate", "X_Client_Certificate"]
    names += ["X-Client-Certificate-Sha256", "X-Subject", "X-Tenant", "X-Forwarded-User", "Client-Cert"]
    with edge.client() as client:
        for name in names:
            for value in escaped, "victim", "":
                error(client.get("/v1/models", headers={name: value}), 401, "missing_key")
    with edge.client(issue(edge.clients, "nobody")) as client:
        error(client.get("/v1/models", headers={"X-Client-Certificate": escaped}), 401, "unknown_certificate")
    with edge.client(authorization=f"Bearer {service.key}") as client:
        answer = client.get("/v1/models", headers={"X-Client-Certificate": escaped, "X-Subject": "victim"})
        assert access_line(service, answer.headers["x-request-id"])["user.id"] == "ada"


def test_an_edge_without_this_configuration_would_let_a_forged_header_in(
    service: Service, tmp_path: Path
) -> None:
    with in_front_of(service.folder / "http.sock", tmp_path / "nginx") as edge:
        victim = issue(edge.clients, "victim")
        add(service, victim, "victim2")
        escaped = quote(victim.read_text(), safe="")
        with service.client("") as on_the_socket:
            answer = on_the_socket.get("/v1/models", headers={"X-Client-Certificate": escaped})
            assert answer.status_code == 200, "otherwise the spoofing test would prove nothing"
            twice = [("X-Client-Certificate", escaped)] * 2
            error(on_the_socket.get("/v1/models", headers=twice), 401, "invalid_certificate")
            for wrong in (
                "",
                "x",
                "%00",
                quote("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            ):
                answer = on_the_socket.get("/v1/models", headers={"X-Client-Certificate": wrong})
                error(answer, 401, "invalid_certificate")


def test_the_edge_passes_on_the_headers_that_the_gateway_reads_and_no_others(tmp_path: Path) -> None:
    heads: list[dict[str, str]] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heads.append({name.lower(): value for name, value in self.headers.items()})
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def address_string(self) -> str:
            return "nginx"

    with ThreadingUnixStreamServer(str(tmp_path / "recorder.sock"), Recorder) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with in_front_of(tmp_path / "recorder.sock", tmp_path / "nginx") as edge:
            certificate = issue(edge.clients, "robot")
            forged = {"X-Forwarded-User": "root", "X-Tenant": "all", "Forwarded": "for=x", "Cookie": "a=b"}
            known = {
                "authorization": "Bearer k",
                "x-request-id": "r",
                "accept": "a/b",
                "x-forwarded-for": "9.9.9.9",
                "origin": "https://localhost",
                "sec-fetch-site": "same-origin",
            }
            with edge.client(certificate, **forged, **known) as client:
                client.post("/generate", json={"prompt": "x"})
        server.shutdown()
    [head] = heads
    assert unquote(head.pop("x-client-certificate")) == certificate.read_text()
    assert head == {
        **known,
        "host": "localhost",
        "content-type": "application/json",
        "content-length": "14",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "https",
    }


def test_an_edge_without_a_client_ca_requests_no_certificate(service: Service, tmp_path: Path) -> None:
    with in_front_of(service.folder / "http.sock", tmp_path / "nginx", edge_client_ca_file="") as edge:
        robot = issue(edge.clients, "robot")
        add(service, robot, "robot3")
        with edge.client(robot) as client:
            error(client.get("/v1/models"), 401, "missing_key")
            answer = client.get("/v1/models", headers={"authorization": f"Bearer {service.key}"})
            assert answer.status_code == 200


def test_revoking_a_certificate_or_its_holder_ends_the_running_stream(service: Service, edge: Edge) -> None:
    file = ["--keys-file", str(service.folder / "keys.json")]
    for name, by_subject in ("one", False), ("two", True):
        certificate = issue(edge.clients, name)
        added = add(service, certificate, name)
        with edge.client(certificate) as client:
            eventually("it works", lambda c=client: c.get("/v1/models").status_code == 200, 5)
            with client.stream("POST", "/v1/chat/completions", json=LONG) as stream:
                what = ["--subject", name] if by_subject else [str(added["id"])]
                assert service.cli("keys", "revoke", *what, *file).returncode == 0
                last = [line for line in stream.iter_lines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "revoked_certificate"
            error(client.get("/v1/models"), 401, "revoked_certificate")


def test_a_certificate_on_a_revocation_list_does_not_pass_the_edge_and_neither_does_its_session(
    service: Service, tmp_path: Path
) -> None:
    folder = tmp_path / "nginx"
    listed = {"__edge_client_crl": str(folder / "clients.crl")}
    with in_front_of(service.folder / "http.sock", folder, **listed) as edge:
        stolen, good = issue(edge.clients, "stolen"), issue(edge.clients, "good")
        add(service, stolen, "stolen")
        add(service, good, "good")
        context = edge.context(stolen)
        answer, session = edge.asked(context, None)
        assert b"200 OK" in answer
        revoke(edge.clients, stolen)
        edge.reload()
        with edge.client(good) as client:
            eventually("it works", lambda: client.get("/v1/models").status_code == 200, 5)
        with edge.client(stolen) as client:
            assert client.get("/v1/models").json()["error"]["code"] == "bad_certificate"
        assert b"bad_certificate" in edge.asked(context, session)[0]
        revoke(edge.clients, days=-1)
        edge.reload()
        with edge.client(good) as client:
            assert client.get("/v1/models").json()["error"]["code"] == "bad_certificate"
        with edge.client() as client:
            error(client.get("/v1/models"), 401, "missing_key")


def test_a_certificate_that_expires_ends_its_running_stream(service: Service, edge: Edge) -> None:
    end = datetime.now(UTC) + timedelta(seconds=10)
    brief = issue(edge.clients, "brief", "-not_after", end.strftime("%Y%m%d%H%M%SZ"))
    assert datetime.fromisoformat(str(add(service, brief, "brief", "--expires", "90d")["expires"])) <= end
    with edge.client(brief) as client:
        eventually("it works", lambda: client.get("/v1/models").status_code == 200, 3)
        with client.stream("POST", "/v1/chat/completions", json=LONG) as stream:
            last = [line for line in stream.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "expired_certificate"
        # The connection was opened before the certificate expired.
        error(client.get("/v1/models"), 401, "expired_certificate")


def test_a_certificate_has_one_holder_until_that_ends(service: Service, edge: Edge) -> None:
    certificate = issue(edge.clients, "shared")
    first = add(service, certificate, "first")
    file = ["--keys-file", str(service.folder / "keys.json")]
    who = [
        "--subject",
        "second",
        "--tenant",
        "t",
        "--role",
        "developer",
        "--certificate",
        str(certificate),
        *file,
    ]
    refused = service.cli("keys", "add", *who)
    assert (refused.returncode, "first" in refused.stderr) == (1, True)
    assert service.cli("keys", "rotate", str(first["id"]), *file).returncode == 1
    service.cli("keys", "revoke", str(first["id"]), *file)
    assert service.cli("keys", "add", *who).returncode == 0
    with edge.client(certificate) as client:
        eventually("the second holder uses it", lambda: client.get("/v1/models").status_code == 200, 5)
    noise = service.folder / "noise.pem"
    noise.write_text("no certificate")
    assert (
        "noise.pem contains no certificate"
        in service.cli("keys", "add", *who, "--certificate", str(noise)).stderr
    )


def test_a_certificate_record_cannot_be_used_as_a_key(service: Service, edge: Edge, tmp_path: Path) -> None:
    certificate = issue(edge.clients, "nokey")
    added = add(service, certificate, "nokey")
    [record] = [each for each in read_keys(service.folder / "keys.json").keys if each.id == added["id"]]
    with edited(tmp_path / "keys.json") as records:
        records.append(record)
    authenticator = Authenticator(KeyTable(tmp_path / "keys.json", b"p" * 16))
    for secret in record.fingerprint, "0" * 64, "":
        with pytest.raises(ApiError, match="invalid_key"):
            authenticator.identify([(b"authorization", f"Bearer llmk_{record.id}_{secret}".encode())])


def test_a_certificate_header_is_trusted_on_a_socket_only(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    content = "metrics: {port: 9400}\nengines: {e: {socket: /e}}\nkeys_file: /k\n"
    content += "identity: {certificate_header: X-Client-Certificate}\n"
    file.write_text(content + "listen: {port: 8000}\n")
    with pytest.raises(ConfigError, match=r"listen\.socket"):
        load(file, GatewayConfig)
    file.write_text(content + "listen: {socket: /s}\n")
    load(file, GatewayConfig)
