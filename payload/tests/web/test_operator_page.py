"""Who sees the operator page, what it says, and what it says where there is no data."""

import math
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from edge import issue, revoke
from markupsafe import escape
from operator_page import BROWSER, KEPT_SECONDS, OTHER_SITE, OperatorPage
from service import eventually
from watched_estate import HOSTILE, WatchedEstate

from llmserve.access.api_keys import edited

PAGES = ("", "day", "hosts", "models", "gpus", "training", "alerts")


@pytest.fixture(scope="module")
def client(page: OperatorPage) -> Iterator[httpx.Client]:
    with page.signed_in() as client:
        yield client


def text(answer: httpx.Response) -> str:
    """What a page says, without its markup."""
    assert answer.status_code == 200, answer.text
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", answer.text))


def expired(page: OperatorPage) -> None:
    """Answers that the page has are too old to be used again."""
    time.sleep(KEPT_SECONDS + 0.5)


# Who sees it.


def test_a_stranger_is_sent_to_the_sign_in_and_sees_nothing(page: OperatorPage) -> None:
    with page.client() as client:
        for name in PAGES:
            answer = client.get(f"/operator/{name}")
            assert (answer.status_code, answer.headers["location"]) == (303, "/operator/sign-in")
            assert answer.content == b""


def test_the_policy_decides_by_role(page: OperatorPage) -> None:
    for role, status in (("operator", 303), ("developer", 403), ("admin", 403), ("auditor", 403)):
        key, _ = page.key(role, f"{role}-1")
        with page.client() as client:
            signed = client.post("/operator/sign-in", data={"key": key}, headers=BROWSER)
            assert signed.status_code == status, role
            assert ("set-cookie" in signed.headers) == (status == 303)
            seen = client.get("/operator/", headers={"authorization": f"Bearer {key}"})
            assert seen.status_code == (200 if status == 303 else 403), role


def test_a_key_is_exchanged_for_a_session_that_scripts_and_other_sites_cannot_use(page: OperatorPage) -> None:
    key, _ = page.key()
    with page.client() as client:
        cookie = client.post("/operator/sign-in", data={"key": f" {key}\n"}, headers=BROWSER).headers[
            "set-cookie"
        ]
        assert client.get("/operator/").status_code == 200
    name, *flags = cookie.split("; ")
    assert name.startswith("__Host-")
    assert key not in cookie
    assert len(name.partition("=")[2]) >= 43
    assert {flag.lower() for flag in flags} == {"httponly", "secure", "samesite=strict", "path=/"}


@pytest.mark.parametrize("sent", ["", "llmk_0", "llmk_000000000000_" + "0" * 48, "x" * 200])
def test_a_wrong_key_opens_no_session(page: OperatorPage, sent: str) -> None:
    with page.client() as client:
        answer = client.post("/operator/sign-in", data={"key": sent}, headers=BROWSER)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert 'role="alert"' in answer.text
        assert not sent or sent not in answer.text


def test_forms_of_other_sites_are_refused(page: OperatorPage) -> None:
    key, _ = page.key()
    foreign: list[dict[str, str]] = [
        {},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
    ]
    with page.client() as client:
        for headers in foreign:
            answer = client.post("/operator/sign-in", data={"key": key}, headers=headers)
            assert (answer.status_code, "set-cookie" in answer.headers) == (403, False), headers
    with page.signed_in(key) as client:
        assert client.post("/operator/sign-out", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        assert client.get("/operator/").status_code == 200


def test_a_form_is_bounded(page: OperatorPage) -> None:
    with page.client() as client:
        for form, status in (({"key": "x" * 5000}, 413), ({f"key{number}": "x" for number in range(5)}, 400)):
            assert client.post("/operator/sign-in", data=form, headers=BROWSER).status_code == status


def test_a_broken_host_or_form_fails_no_page(page: OperatorPage) -> None:
    """The edge refuses the first, and a client that leaves is not there to read the answer."""
    log = page.process.log
    before = log.read_text().count("invalid_form")
    for host, head, body in (
        (b"[x", b"GET /operator/sign-in", b""),
        (b"x", b"POST /operator/sign-in", b"content-length: 9\r\nsec-fetch-site: same-origin\r\n"),
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(page.gateway.folder / "web.sock"))
            client.sendall(head + b" HTTP/1.1\r\nhost: " + host + b"\r\n" + body + b"\r\n")
            if host != b"x":
                assert client.recv(99).startswith(b"HTTP/1.1 200")
    eventually("the form that broke off is logged", lambda: log.read_text().count("invalid_form") > before)
    assert "a page failed" not in log.read_text()


def test_a_session_ends_with_its_key(page: OperatorPage) -> None:
    key, identifier = page.key()
    with page.signed_in(key) as client:
        assert client.get("/operator/alerts").status_code == 200
        assert (
            page.gateway.cli(
                "keys", "revoke", identifier, "--keys-file", str(page.gateway.folder / "keys.json")
            ).returncode
            == 0
        )
        eventually("the session has ended", lambda: client.get("/operator/alerts").status_code == 303)


def test_signing_out_ends_the_session_and_not_only_the_cookie(page: OperatorPage) -> None:
    with page.signed_in() as client:
        stolen = dict(client.cookies)
        assert client.post("/operator/sign-out", headers=BROWSER).status_code == 303
        with page.client() as thief:
            thief.cookies.update(stolen)
            assert thief.get("/operator/").status_code == 303


def test_a_client_certificate_needs_no_session(page: OperatorPage) -> None:
    certificate = issue(page.edge.clients, "otto")
    key_file = ["--keys-file", str(page.gateway.folder / "keys.json")]
    who = [
        "--subject",
        "otto",
        "--tenant",
        "operations",
        "--role",
        "operator",
        "--certificate",
        str(certificate),
    ]
    with page.client(certificate) as client:
        assert client.get("/operator/").status_code == 401  # of our CA, and not registered
        assert page.gateway.cli("keys", "add", *who, *key_file).returncode == 0
        assert "otto" in text(client.get("/operator/"))
        linked = client.get("/operator/gpus", headers=OTHER_SITE)
        assert linked.status_code == 200
        assert '<meta http-equiv="refresh" content="0; url=/operator/gpus">' in linked.text
        assert "otto" not in linked.text
    with page.client() as forged:
        assert (
            forged.get(
                "/operator/", headers={"x-client-certificate": certificate.read_text().replace("\n", "%0A")}
            ).status_code
            == 303
        )


def test_each_view_is_on_the_audit_record(page: OperatorPage) -> None:
    key, identifier = page.key(subject="wanda")
    with page.signed_in(key) as client:
        client.get("/operator/gpus")
    with page.client() as stranger:
        stranger.post("/operator/sign-in", data={"key": "llmk_0_0"}, headers=BROWSER)

    def recorded() -> list[tuple[str, str, str]]:
        return [
            (event["event.action"], event["url.path"], event["llmkeep.audit.phase"])
            for event in page.records()
            if event.get("llmkeep.identity.id") == identifier
        ]

    eventually("both are recorded", lambda: len(recorded()) == 4)
    signed, seen = ("POST /operator/sign-in", "/operator/sign-in"), ("GET /operator/*", "/operator/gpus")
    assert recorded() == [(*what, phase) for what in (signed, seen) for phase in ("intent", "outcome")]
    assert key not in "".join(map(str, page.gateway.records())) + page.gateway.logs()


def test_without_the_record_nothing_is_shown(page: OperatorPage, client: httpx.Client) -> None:
    assert page.gateway.writer
    page.gateway.writer.stop()
    try:
        answer = client.get("/operator/")
        assert answer.status_code == 503
        assert "llm1" not in answer.text
    finally:
        page.gateway.start_writer()
    eventually("it is shown again", lambda: client.get("/operator/").status_code == 200)


# What it says.


def test_headers_forbid_scripts_frames_and_caches(client: httpx.Client) -> None:
    for path in ("/operator/", "/operator/sign-in", "/operator/nothing", "/operator/style.css"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy
        assert "form-action 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert (headers.get("cache-control") == "no-store") == (not path.endswith(".css"))


def test_pages_have_neither_scripts_nor_styles_nor_addresses_of_others(client: httpx.Client) -> None:
    for name in PAGES:
        answer = client.get(f"/operator/{name}")
        assert answer.status_code == 200
        assert not re.search(
            r"<script|<style|\sstyle=|\son[a-z]+=", answer.text.replace(str(escape(HOSTILE)), "")
        )
        links = re.findall(r'(?:href|src|action)="(https?:[^"]*)"', answer.text)
        assert set(links) <= {"https://docs.example/metrics.md#target-down"}


def test_hostile_labels_and_annotations_are_text(client: httpx.Client) -> None:
    for name in ("hosts", "alerts"):
        page = client.get(f"/operator/{name}").text
        assert str(escape(HOSTILE)) in page
        assert "<script" not in page
    assert 'href="javascript' not in client.get("/operator/alerts").text


def test_the_overview_says_what_is_wrong_first(client: httpx.Client) -> None:
    said = text(client.get("/operator/"))
    assert "node on train1 does not answer Prometheus" in said
    assert "Watchdog" not in said  # nor that it is missing
    assert "at Alertmanager" in said
    assert re.search(
        r"TimeToFirstToken deepseek-chat · streams that begin within 0.5 s 99 % 99.6 % 60 %", said
    )
    assert re.search(r"Availability · requests 99.9 % no data no data", said)
    assert "Bundle serial 42" in said
    assert re.search(r"Last check of the audit record 1\d min", said)
    assert "Alterations of the audit record 1 " in said  # of a host that exports -1
    assert "Drifted files 1 " in said
    assert "Last backup never" in said
    assert "Failed units 0" in said
    assert re.search(r"train1 down node node", said)
    assert re.search(r"llm1 up gateway, gpu, node", said)


def test_models_gpus_and_training_are_shown(client: httpx.Client) -> None:
    models = text(client.get("/operator/models"))
    assert re.search(r"deepseek-chat llm1 2 ", models)
    assert re.search(r"embed-small llm1 0 ", models)
    gpus = text(client.get("/operator/gpus"))
    assert re.search(r"llm1 3 does not answer no data no data no data no data 1 79 × 1", gpus)
    assert re.search(r"llm1 0 NVIDIA A100-SXM4-80GB .* none", gpus)
    assert "domain-lora Running 1200" in text(client.get("/operator/training"))


def test_a_plot_has_title_description_and_its_table(client: httpx.Client) -> None:
    page = client.get("/operator/gpus").text
    [identifier] = re.findall(r'aria-labelledby="(busy_plot)-t busy_plot-d"', page)
    assert re.search(
        rf'<title id="{identifier}-t">GPUs: busy share</title><desc id="{identifier}-d">[^<]+llm1 0 ', page
    )
    assert page.count('<path class="line s0" d="M') >= 2
    [table] = re.findall(
        r"<summary>GPUs: busy share: as a table</summary>\s*<table.*?</table>", page, re.DOTALL
    )
    assert table.count("<tr") == 14
    assert "no data" not in table


def test_the_last_24_hours_have_a_plot_of_each(client: httpx.Client) -> None:
    page = client.get("/operator/day").text
    for title, latest in (
        ("Time to first token, P50 and P99 of all models", "P50 0.[12]\\d* s, P99 0.\\d+ s"),
        ("Tokens per second, by kind", r"completion 900 /s, prompt \d+ /s"),
        ("Waiting requests, by model", r"deepseek-chat [\d.e-]+"),
        ("Requests per minute that failed", r"429 0 /min, 5xx [\d.]+ /min"),
        ("GPU utilisation, mean by host", r"llm1 \d[\d.]* %"),
    ):
        assert re.search(
            rf"<title [^>]*>{title}[^<]*</title><desc [^>]*>Lines over 24 hours. Last values: {latest}\.</desc>",
            page,
        ), title
    assert "llm1: " in text(client.get("/operator/day"))
    assert "No data" not in page


def test_language_by_header_and_by_link(page: OperatorPage) -> None:
    with page.signed_in() as client:
        assert (
            "触发中的告警"
            in client.get("/operator/", headers={"accept-language": "zh-CN,zh;q=0.9,en;q=0.1"}).text
        )
        assert (
            "Firing alerts"
            in client.get("/operator/", headers={"accept-language": "fr, en;q=0.5, zh;q=0.2"}).text
        )
        assert 'lang="zh-Hans"' in client.get("/operator/?language=zh").text
        assert (
            "触发中的告警" in client.get("/operator/", headers={"accept-language": "en"}).text
        )  # it is remembered


# What it says where there is no data.


def test_without_prometheus_nothing_is_green_or_zero(
    page: OperatorPage, estate: WatchedEstate, client: httpx.Client
) -> None:
    before = text(client.get("/operator/"))
    assert "No data" not in before
    estate.stop("prometheus")
    try:
        expired(page)
        for name in PAGES:
            begun = time.monotonic()
            answer = client.get(f"/operator/{name}")
            assert time.monotonic() - begun < 10
            said = text(answer)
            assert "Prometheus does not answer" in said, name
            assert re.search(r"No data since (this page|20\d\d-)", said), name
            assert 'class="good"' not in answer.text
            assert '<svg class="plot"' not in answer.text
        assert re.search(r"No data since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", text(client.get("/operator/")))
    finally:
        estate.start("prometheus")
        eventually("alerts fire", lambda: "Hostile" in estate.get("prometheus", "/api/v1/alerts").text)
    expired(page)
    assert "No data" not in text(client.get("/operator/hosts"))


def test_without_alertmanager_delivery_is_unknown(
    page: OperatorPage, estate: WatchedEstate, client: httpx.Client
) -> None:
    estate.stop("alertmanager")
    try:
        expired(page)
        said = text(client.get("/operator/alerts"))
        assert "whether alerts are delivered is unknown" in said
        assert "TargetDown" in said
        assert "at Alertmanager" not in said
        assert "not at Alertmanager" not in said
    finally:
        estate.start("alertmanager")
        eventually("alerts arrive", estate.alerts_arrived, 60)
    expired(page)


def test_a_storm_of_reloads_asks_prometheus_once(
    page: OperatorPage, estate: WatchedEstate, client: httpx.Client
) -> None:
    def asked() -> float:
        lines = estate.get("prometheus", "/metrics").text.splitlines()
        found = [
            line
            for line in lines
            if line.startswith('prometheus_http_requests_total{code="200",handler="/api/v1/query"}')
        ]
        return float(found[0].rpartition(" ")[2])

    client.get("/operator/models")
    before, begun = asked(), time.monotonic()
    for _ in range(50):
        client.get("/operator/models")
    periods = (time.monotonic() - begun) / KEPT_SECONDS + 1
    assert asked() - before <= 7 * math.ceil(periods)  # the page asks seven questions
    assert periods < 50, "else each reload asks anew"


def test_a_subject_that_is_gone_from_the_keys_sees_nothing(page: OperatorPage) -> None:
    key, identifier = page.key()
    with page.signed_in(key) as client:
        with edited(page.gateway.folder / "keys.json") as records:
            records[:] = [record for record in records if record.id != identifier]
        eventually("the session has ended", lambda: client.get("/operator/").status_code == 303)


def test_nothing_else_answers_there(client: httpx.Client, tmp_path: Path) -> None:
    for path, status in (
        ("/operator", 308),
        ("/operator/nothing", 404),
        ("/operator/%2e%2e/x", 401),
        ("/operator/static/style.css", 404),
    ):
        assert client.get(path).status_code == status, path
    assert client.post("/operator/").status_code == 405


# What Prometheus' host shows.


def test_prometheus_is_shown_to_edges_alone_and_only_what_the_page_reads(
    page: OperatorPage, estate: WatchedEstate
) -> None:
    def status(path: str, method: str = "GET", certificate: Path | None = estate.host) -> int:
        context = ssl.create_default_context(cafile=str(estate.ca))
        if certificate:
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        with httpx.Client(verify=context, base_url=f"https://localhost:{page.monitors}") as client:
            return client.request(method, path).status_code

    asked = "/prometheus/api/v1/query?query=up"
    assert status(asked) == 200
    assert status("/alertmanager/api/v2/alerts") == 200
    assert status(asked, "POST") == 403
    for path in (
        "/prometheus/api/v1/status/config",
        "/prometheus/-/reload",
        "/prometheus/metrics",
        "/alertmanager/api/v2/silences",
        "/",
    ):
        assert status(path) == 404, path
    assert status(asked, certificate=None) == 400
    assert status(asked, certificate=issue(estate.ca, "train1")) == 403


def test_a_revoked_page_sees_nothing(estate: WatchedEstate, tmp_path: Path) -> None:
    other = WatchedEstate(tmp_path / "other", estate.ports)
    with other.shown() as port:
        revoke(other.ca, other.host)
        subprocess.run(["nginx", "-c", str(other.folder / "nginx/nginx.conf"), "-s", "reload"], check=True)

        def refused() -> bool:
            with httpx.Client(verify=other.context()) as client:
                return client.get(f"https://localhost:{port}/prometheus/api/v1/query").status_code == 400

        eventually("it is refused", refused)
