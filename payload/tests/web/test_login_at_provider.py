"""Sign-in on the chat page at an identity provider, which is a stand-in."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import browser
import httpx2 as httpx
import pytest
from browser import CHROMIUM, NO_QUOTAS
from chat_page import ChatPage, served, token
from operator_page import BROWSER
from provider_login import ProviderLogin, provider_login
from service import eventually

from llmserve.access.oidc import Issuer
from llmserve.api.errors import ApiError
from llmserve.settings import Oidc
from llmweb.login import BEGUN_SECONDS, Logins
from llmweb.settings import Login

ASKED = {"model": "echo", "messages": [{"role": "user", "content": "the quick brown fox"}]}


@pytest.fixture(scope="module")
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderLogin]:
    with provider_login(tmp_path_factory.mktemp("provider") / "idp") as login:
        yield login


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, login: ProviderLogin) -> Iterator[ChatPage]:
    aliases = {"default": {"model": "slow"}, "old": {"model": "echo", "deprecated": "2026-11-01"}}
    with served(tmp_path_factory.mktemp("chat"), login=login, aliases=aliases) as chat:
        yield chat


@pytest.fixture
def client(chat: ChatPage) -> Iterator[httpx.Client]:
    with chat.edge.client(None, **BROWSER) as client:
        yield client


def code_of(client: httpx.Client, login: ProviderLogin) -> dict[str, str]:
    """What the provider sends the browser back with."""
    begun = client.get("/page/provider")
    assert begun.status_code == 303
    asked = {name: value for name, [value] in parse_qs(urlsplit(begun.headers["location"]).query).items()}
    back = urlsplit(login.authorize(asked))
    assert back.path == "/page/signed-in"
    return {name: value for name, [value] in parse_qs(back.query).items()}


def test_a_token_opens_a_session_that_does_not_show_it(
    chat: ChatPage, login: ProviderLogin, client: httpx.Client
) -> None:
    assert 'href="/page/provider"' in client.get("/page/sign-in").text
    answer = client.get("/page/signed-in", params=code_of(client, login))
    assert answer.status_code == 200, answer.text
    [session] = [each for each in answer.headers.get_list("set-cookie") if "__Host-llmkeep-session" in each]
    assert "httponly" in session.lower()
    assert "eyJ" not in session
    page = client.get("/").text
    assert "Signed in as lea@corp" in page
    assert 'action="/page/sign-out"' in page
    asked = client.post("/page/v1/chat/completions", json=ASKED, headers={"x-csrf-token": token(client)})
    assert asked.json()["choices"][0]["message"]["content"] == "the quick brown fox"

    def recorded() -> list[dict[str, Any]]:
        request = asked.headers["x-request-id"]
        return [each for each in chat.gateway.records() if each.get("http.request.id") == request]

    for event in eventually("it is recorded", lambda: len(recorded()) == 2 and recorded()):
        assert (event["user.id"], event["organization.id"]) == ("lea@corp", "corp")
        assert event["llmkeep.identity.kind"] == "oidc"
    assert "eyJ" not in chat.gateway.logs()


@pytest.mark.parametrize("changed", [{"state": "x"}, {"code": "x"}, {"code": ""}, {"error": "access_denied"}])
def test_a_forged_return_opens_no_session(
    login: ProviderLogin, client: httpx.Client, changed: dict[str, str]
) -> None:
    answer = client.get("/page/signed-in", params=code_of(client, login) | changed)
    assert answer.status_code == 401
    assert "__Host-llmkeep-session" not in str(answer.headers)


def test_a_return_counts_once_and_in_the_browser_that_began(
    chat: ChatPage, login: ProviderLogin, client: httpx.Client
) -> None:
    back = code_of(client, login)
    with chat.edge.client(None, **BROWSER) as victim:
        assert victim.get("/page/signed-in", params=back).status_code == 401
    assert client.get("/page/signed-in", params=back).status_code == 200
    assert client.get("/page/signed-in", params=back).status_code == 401


def test_a_sign_in_outlives_a_restart_of_the_page_but_not_its_time(
    login: ProviderLogin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider is not asked here: its answer is made up."""
    settings = login.settings("https://ask.example/page/signed-in")
    config, oidc = Login.model_validate(settings["login"]), Oidc.model_validate(settings["oidc"])
    before, after = Logins(config, Issuer(oidc)), Logins(config, Issuer(oidc))
    monkeypatch.setattr(after, "ask", lambda _: (200, {"access_token": "token"}))
    cookie, address = before.begin()
    [state] = parse_qs(urlsplit(address).query)["state"]
    assert asyncio.run(after.finish(cookie, state, "code")) == "token"
    now = time.time()
    for later in (-5, BEGUN_SECONDS + 5):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        with pytest.raises(ApiError) as refused:
            asyncio.run(after.finish(cookie, state, "code"))
        assert refused.value.code == "login_failed"


def test_the_policy_decides_by_the_groups_of_the_token(login: ProviderLogin, client: httpx.Client) -> None:
    try:
        for groups in ["auditors"], ["developer"], []:
            login.claims = {"realm": {"groups": groups}}
            assert client.get("/page/signed-in", params=code_of(client, login)).status_code == 403
    finally:
        login.claims = {}


def test_an_expired_token_opens_no_session(login: ProviderLogin, client: httpx.Client) -> None:
    login.claims = {"exp": 0}
    try:
        assert client.get("/page/signed-in", params=code_of(client, login)).status_code == 401
    finally:
        login.claims = {}


def test_a_session_ends_with_its_token(login: ProviderLogin, client: httpx.Client) -> None:
    for seconds in (2, 30):  # the longer one where this machine cannot sign in within the shorter
        login.claims = {"exp": int(time.time()) + seconds}
        try:
            signed = client.get("/page/signed-in", params=code_of(client, login))
        finally:
            login.claims = {}
        if began := (signed.status_code == client.get("/").status_code == 200):
            break
    assert began
    eventually("the session has ended", lambda: client.get("/").status_code == 303)


def test_a_blocked_subject_has_no_session(chat: ChatPage, login: ProviderLogin, client: httpx.Client) -> None:
    login.claims = {"sub": "mallory@corp"}
    try:
        assert client.get("/page/signed-in", params=code_of(client, login)).status_code == 200
    finally:
        login.claims = {}
    headers = {"x-csrf-token": token(client)}
    assert client.get("/page/v1/models", headers=headers).status_code == 200
    keys_file = str(chat.gateway.folder / "keys.json")
    assert (
        chat.gateway.cli("keys", "revoke", "--subject", "mallory@corp", "--keys-file", keys_file).returncode
        == 0
    )
    eventually("it is refused", lambda: client.get("/page/v1/models", headers=headers).status_code == 401)
    eventually("the session has ended", lambda: client.get("/").status_code == 303)


def test_a_session_survives_keys_of_the_provider_that_cannot_be_read(
    login: ProviderLogin, client: httpx.Client
) -> None:
    assert client.get("/page/signed-in", params=code_of(client, login)).status_code == 200
    login.provider.jwks_file.write_text("{")
    try:
        eventually("nothing can be told", lambda: client.get("/").status_code == 503)
    finally:
        login.provider.publish()
    eventually("the session is still there", lambda: client.get("/").status_code == 200)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium-headless-shell of requirements.apt")
def test_a_browser_comes_back_to_the_page(chromium: Any, chat: ChatPage, login: ProviderLogin) -> None:
    with browser.tab(chromium, chat.edge.port, "en", "light", 800, login.address, NO_QUOTAS) as opened:
        opened.goto("/")
        opened.get_by_role("link", name="Sign in with your organisation").click()
        opened.get_by_label("Your question").wait_for()
        opened.locator("#model option").first.wait_for(state="attached")
        assert opened.locator("#model option").all_text_contents() == ["echo", "slow", "default"]
        assert opened.locator("#model").input_value() == "default", "and no retired name is offered"
        assert "lea@corp" in opened.locator("footer").inner_text()
