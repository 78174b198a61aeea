"""Who may chat on the page, by which way its requests go, and what it refuses."""

import gzip
import hashlib
import html
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from chat_page import ChatPage, token
from operator_page import BROWSER, OTHER_SITE
from service import eventually

import llmweb
from llmweb.chat_wording import SCRIPT

STATIC = Path(llmweb.__file__).parent / "static"
ASKED: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "stream": True,
}
CHAT = "/page/v1/chat/completions"
VENDORED = yaml.safe_load((STATIC / "vendor.yml").read_text())


@pytest.fixture
def client(chat: ChatPage) -> Iterator[httpx.Client]:
    with chat.signed_in() as client:
        yield client


def text(answer: httpx.Response) -> str:
    """What the events of an answer say."""
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(event)["choices"] for event in events]
    return "".join(each[0]["delta"].get("content", "") for each in choices if each)


# Sign-in.


def test_a_stranger_is_sent_to_the_sign_in(chat: ChatPage) -> None:
    with chat.edge.client() as stranger:
        answer = stranger.get("/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/page/sign-in")
        assert "API key" in stranger.get("/page/sign-in").text


def test_a_key_opens_a_session_that_scripts_cannot_read(chat: ChatPage) -> None:
    key, _ = chat.key()
    with chat.edge.client(None, **BROWSER) as client:
        answer = client.post("/page/sign-in", data={"key": key})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        _, *flags = answer.headers["set-cookie"].lower().split("; ")
        assert set(flags) == {"httponly", "secure", "samesite=strict", "path=/"}
        page = client.get("/")
        assert "Signed in as ada" in page.text
        assert key not in page.text


def test_policy_decides_who_may_chat(chat: ChatPage) -> None:
    for role, status in (("developer", 303), ("trainer", 303), ("operator", 403), ("auditor", 403)):
        with chat.edge.client(None, **BROWSER) as client:
            answer = client.post("/page/sign-in", data={"key": chat.key(role, f"{role}-2")[0]})
            assert (answer.status_code, "set-cookie" in answer.headers) == (status, status == 303), role


def test_a_wrong_key_is_refused_and_not_shown(chat: ChatPage) -> None:
    with chat.edge.client(None, **BROWSER) as client:
        answer = client.post("/page/sign-in", data={"key": "llmk_000000000000_" + "0" * 48})
        assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
        assert "llmk_0000" not in answer.text


def test_a_client_certificate_opens_a_session(chat: ChatPage) -> None:
    with chat.edge.client(chat.certificate("carla"), **BROWSER) as client:
        answer = client.get("/")
        # No redirect: after a link of another site it would come without the session's cookie, and open the next one.
        assert answer.status_code == 200
        assert '<meta http-equiv="refresh" content="0; url=/">' in answer.text
        assert "__Host-llmkeep-session" in client.cookies
        answer = client.post(CHAT, json=ASKED, headers={"x-csrf-token": token(client)})
        assert text(answer) == "the quick brown fox"


def test_a_session_of_a_certificate_needs_that_certificate_at_each_request(chat: ChatPage) -> None:
    with chat.edge.client(chat.certificate("carol"), **BROWSER) as client:
        client.get("/")
        csrf, stolen = token(client), dict(client.cookies)
    for certificate in (None, chat.certificate("dora")):
        with chat.edge.client(certificate, **BROWSER) as thief:
            thief.cookies.update(stolen)
            assert thief.post(CHAT, json=ASKED, headers={"x-csrf-token": csrf}).status_code == 401
            assert "carol" not in thief.get("/").text


def test_an_authorization_header_opens_a_session(chat: ChatPage) -> None:
    with chat.edge.client(None, authorization=f"Bearer {chat.gateway.key}", **BROWSER) as client:
        client.get("/")
        del client.headers["authorization"]
        assert "Signed in as ada" in client.get("/").text


def test_a_link_of_another_site_opens_no_session_until_its_browser_comes_back_from_this_one(
    chat: ChatPage,
) -> None:
    with chat.edge.client(chat.certificate("petra"), **BROWSER) as client:
        client.get("/")
        own = dict(client.cookies)
        for number in range(2):
            with chat.edge.client(chat.edge.folder / "petra.pem", **OTHER_SITE) as linked:
                answer = linked.get(f"/?language=zh&of={number}")
                assert (answer.status_code, "__Host-llmkeep-session" in linked.cookies) == (200, False)
                url = html.escape(f"/?language=zh&of={number}")
                assert f'<meta http-equiv="refresh" content="0; url={url}">' in answer.text
        assert dict(client.cookies) == own
        assert "Signed in as petra" in client.get("/").text


# Asking.


def test_an_answer_is_streamed_with_the_id_that_it_is_rated_by(client: httpx.Client) -> None:
    answer = client.post(CHAT, json=ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert text(answer) == "the quick brown fox"
    assert len(answer.headers["x-llm-response-id"]) == 40
    assert answer.headers["x-llm-model"] == "echo"


def test_the_models_are_those_of_the_gateway(client: httpx.Client) -> None:
    assert [each["id"] for each in client.get("/page/v1/models").json()["data"]] == ["echo", "slow"]


def test_the_gateway_records_who_asked_by_which_key_and_from_where(chat: ChatPage) -> None:
    key, identifier = chat.key(subject="rosa")
    with chat.signed_in(key) as client:
        request = client.post(CHAT, json=ASKED).headers["x-request-id"]

    def recorded() -> list[dict[str, Any]]:
        return [each for each in chat.gateway.records() if each.get("http.request.id") == request]

    events = eventually("intent and outcome are recorded", lambda: len(recorded()) == 2 and recorded())
    for event in events:
        assert event["event.action"] == "POST /v1/chat/completions"
        assert (event["user.id"], event["llmkeep.identity.id"]) == ("rosa", identifier)
        assert event["source.ip"] == "127.0.0.1"


def test_neither_key_nor_session_nor_what_was_said_is_logged(chat: ChatPage) -> None:
    key, _ = chat.key()
    with chat.signed_in(key) as client:
        client.post(CHAT, json=ASKED | {"messages": [{"role": "user", "content": "marmalade"}]})
        session = next(iter(client.cookies.values()))
    eventually("it is logged", lambda: '"url.path":"/page/v1/chat/completions"' in chat.gateway.logs())
    for secret in (key, "marmalade", session):
        assert secret not in chat.gateway.logs()


def test_a_client_that_leaves_ends_its_answer(chat: ChatPage) -> None:
    """Also while it waits for the first token, as this one does."""

    def left() -> float:
        return chat.gateway.metrics().get('llm_cancelled_total{by="client"}', 0.0)

    before = left()
    with chat.signed_in() as client:

        def leaves() -> bool:
            """Perhaps before the gateway has the request; then the next one does."""
            with pytest.raises(httpx.TimeoutException):
                client.post(CHAT, json=ASKED | {"model": "slow"}, timeout=0.3)
            return left() > before

        eventually("the gateway has ended it", leaves)


def test_the_page_adds_no_more_than_a_hop(chat: ChatPage, client: httpx.Client) -> None:
    """Time to the first byte of an answer, by the page and by the gateway beside it: the least of each, on a busy machine."""
    by_page, beside = [], []

    def seconds(asked: httpx.Client, path: str) -> float:
        begun = time.monotonic()
        with asked.stream("POST", path, json=ASKED) as answer:
            next(answer.iter_raw())
            return time.monotonic() - begun

    def little_more() -> bool:
        for _ in range(5):
            by_page.append(seconds(client, CHAT))
            beside.append(seconds(direct, "/v1/chat/completions"))
        return min(by_page) - min(beside) < 0.05

    with chat.edge.client(authorization=f"Bearer {chat.gateway.key}") as direct:
        eventually("an answer by the page begins at most 50 ms later", little_more)


# What is refused.


def test_a_request_without_session_token_or_from_another_site_is_refused(
    chat: ChatPage, client: httpx.Client
) -> None:
    with chat.signed_in() as other:
        foreign = other.headers["x-csrf-token"]
    for headers in (
        {"x-csrf-token": ""},
        {"x-csrf-token": foreign},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        answer = client.post(CHAT, json=ASKED, headers=headers)
        assert answer.status_code == 403, headers
        assert answer.json()["error"]["code"] in {"csrf", "cross_site"}
    with chat.edge.client(None, authorization=f"Bearer {chat.gateway.key}", **BROWSER) as keyed:
        assert keyed.post(CHAT, json=ASKED).json()["error"]["code"] == "no_session"


def test_one_subject_asks_eight_things_at_once_whichever_the_session(chat: ChatPage) -> None:
    minute = ASKED | {"model": "slow", "messages": [{"role": "user", "content": "word " * 60}]}

    def begun(client: httpx.Client) -> httpx.Response:
        return client.send(client.build_request("POST", CHAT, json=minute), stream=True)

    with chat.signed_in(subject="otto") as one, chat.signed_in(subject="otto") as other:
        with ThreadPoolExecutor(8) as threads:
            coming = list(threads.map(begun, [one, other] * 4))
        assert {answer.status_code for answer in coming} == {200}
        for client in one, other:
            assert client.post(CHAT, json=minute).json()["error"]["code"] == "too_many_at_once"
        for answer in coming:
            answer.close()
        eventually(
            "those that have ended do not count", lambda: one.get("/page/v1/models").status_code == 200
        )


def test_what_the_page_itself_refuses_is_recorded(chat: ChatPage) -> None:
    def recorded(request: str) -> list[dict[str, Any]]:
        return [each for each in chat.gateway.records() if each.get("http.request.id") == request]

    with chat.signed_in(subject="nora") as client:
        refused = client.post(CHAT, json=ASKED, headers={"x-csrf-token": ""}).headers["x-request-id"]
    [event] = eventually("it is recorded", lambda: recorded(refused))
    assert (event["event.action"], event["error.code"]) == (f"POST {CHAT}", "csrf")
    assert (event["user.id"], event["organization.id"]) == ("nora", "research")


def test_a_session_ends_with_its_key(chat: ChatPage) -> None:
    key, identifier = chat.key()
    with chat.signed_in(key) as client:
        keys_file = str(chat.gateway.folder / "keys.json")
        assert chat.gateway.cli("keys", "revoke", identifier, "--keys-file", keys_file).returncode == 0
        eventually("the gateway refuses it", lambda: client.get("/page/v1/models").status_code == 401)
        eventually("the session has ended", lambda: client.get("/").status_code == 303)


def test_nothing_but_what_the_page_needs_is_passed_on(client: httpx.Client) -> None:
    for method, path in (
        ("GET", "/page/v1/models/echo"),
        ("GET", "/page/v1/../openapi.json"),
        ("GET", CHAT),
        ("POST", "/page/v1/usage"),
        ("POST", "/page/v1/completions"),
        ("POST", "/page/v1/responses"),
        ("POST", "/page/v1/embeddings"),
        ("GET", "/page/"),
        ("GET", "/page/static/chat.js"),
    ):
        assert client.request(method, path, json=ASKED if method == "POST" else None).status_code == 404, path


def test_what_is_left_is_asked_of_the_gateway(client: httpx.Client) -> None:
    answer = client.get("/page/v1/usage")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "usage_unavailable"), (
        "this one has no Redis"
    )


def test_the_script_has_all_of_its_words() -> None:
    script = "".join(path.read_text() for path in (STATIC / "chat").glob("*.js"))
    names = set(re.findall(r'words\(\s*"(\w+)"', script)) | set(re.findall(r"ended = \"(\w+)\"", script))
    assert names - SCRIPT.keys() == set()


def test_an_answer_is_rated_by_its_subject_alone(chat: ChatPage, client: httpx.Client) -> None:
    rating = {"id": client.post(CHAT, json=ASKED).headers["x-llm-response-id"], "thumb": "up"}
    with chat.signed_in(subject="mallory") as other:
        assert other.post("/page/v1/feedback", json=rating).json()["error"]["code"] == "response_not_found"
    assert client.post("/page/v1/feedback", json=rating).json()["text_kept"] is True
    forged = rating | {"id": "A" * 40}
    assert client.post("/page/v1/feedback", json=forged).status_code == 404


def test_subjects_see_and_delete_their_own_alone(chat: ChatPage) -> None:
    with chat.signed_in(subject="vera") as vera, chat.signed_in(subject="vera", tenant="sales") as namesake:
        for each in (vera, namesake):
            rating = {
                "id": each.post(CHAT, json=ASKED).headers["x-llm-response-id"],
                "thumb": "down",
                "comment": "no",
            }
            assert each.post("/page/v1/feedback", json=rating).status_code == 200

        def kept(client: httpx.Client) -> list[dict[str, Any]]:
            return list(client.get("/page/v1/feedback").json()["data"])

        eventually("exchange and rating are kept", lambda: len(kept(vera)) == 2)
        by_kind = {each["object"]: each for each in kept(vera)}
        assert by_kind["rating"]["comment"] == "no"
        assert by_kind["exchange"]["prompt"] == ASKED["messages"]
        assert "echo" not in json.dumps(
            by_kind
        )  # nor which model it was, which could be an arm of an experiment
        [only] = kept(namesake)  # of a tenant that keeps no texts
        assert (only["thumb"], only["comment"]) == ("down", None)
        assert vera.delete("/page/v1/feedback").json() == {
            "object": "feedback.forgotten",
            "removed": 2,
            "left": 0,
        }
        assert (kept(vera), len(kept(namesake))) == ([], 1)


def test_nothing_is_deleted_under_a_legal_hold(chat: ChatPage, client: httpx.Client) -> None:
    hold = chat.gateway.folder / "hold"
    hold.touch()
    try:
        answer = client.delete("/page/v1/feedback")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "legal_hold")
    finally:
        hold.unlink()
    assert client.delete("/page/v1/feedback").status_code == 200


def test_without_a_gateway_the_page_says_so(chat: ChatPage, client: httpx.Client) -> None:
    assert chat.gateway.gateway
    chat.gateway.gateway.stop()
    try:
        answer = client.post(CHAT, json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert client.get("/").status_code == 200
    finally:
        chat.gateway.start_gateway()
    eventually("it answers again", lambda: client.post(CHAT, json=ASKED).status_code == 200)


# What a browser is given.


def test_headers_allow_scripts_of_this_page_alone(client: httpx.Client) -> None:
    for path in ("/", "/page/sign-in", "/page/nothing", "/page/chat.js"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy
    assert client.get("/").headers["cache-control"] == "no-store"
    assert client.get("/page/chat.js").headers["cache-control"] == "no-cache"
    assert not re.search(
        r"<script(?! type=\"module\" src=)|<style|\sstyle=|\son[a-z]+=", client.get("/").text
    )


def test_the_page_is_below_200_kilobytes_and_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/").text
    waiting = re.findall(r'(?:href|src)="(/page/[^"]+\.\w+)"', page)
    loaded: dict[str, bytes] = {"/": page.encode()}
    while waiting:
        path = waiting.pop()
        if path not in loaded:
            answer = client.get(path)
            assert answer.status_code == 200, path
            loaded[path] = answer.content
            if path.endswith(".js"):
                assert answer.headers["content-type"].startswith("text/javascript")
                waiting += [
                    f"/page/{name}" for name in re.findall(r'(?:from|import) "\./([\w.]+)";', answer.text)
                ]
    assert {"/page/chat.js", "/page/purify.min.js", "/page/marked.esm.js"} <= loaded.keys()
    assert sum(len(gzip.compress(body)) for body in loaded.values()) < 200_000
    assert not re.search(r'(?:href|src)="(?:https?:)?//', page)


def test_each_vendored_file_is_listed_by_its_hash() -> None:
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").iterdir()
    }
    assert found == {row["file"]: row["sha256"] for row in VENDORED}


@pytest.mark.parametrize(
    "script", [row for row in VENDORED if row["file"].endswith(".js")], ids=lambda row: row["file"]
)
def test_a_vendored_script_is_listed_with_the_version_in_its_header(script: dict[str, str]) -> None:
    header = (STATIC / "vendor" / script["file"]).read_text()[:200]
    assert re.findall(r"(?:marked v|DOMPurify )([0-9.]+)", header) == [script["version"]]
    assert script["purl"].endswith(f"@{script['version']}")
