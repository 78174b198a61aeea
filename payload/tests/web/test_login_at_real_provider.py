"""Sign-in on the chat page at a real identity provider: code flow, PKCE, groups that become roles, and its keys' rotation."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2 as httpx
import pytest
from chat_page import ChatPage, served, token
from cryptography.hazmat.primitives.asymmetric import ec
from oidc_provider import ABSENT, OidcProvider, oidc_provider
from operator_page import BROWSER
from service import eventually

pytestmark = pytest.mark.skipif(
    ABSENT, reason="needs Node.js and npm, by which `make env` installs oidc-provider"
)
COOKIE = "__Host-llmkeep-login"
ASKED = {"model": "default", "messages": [{"role": "user", "content": "the quick brown fox"}]}
GROUPS: dict[str, Any] = {
    "lea": ["everybody", "developers"],
    "max": ["everybody", "developer", "Developers"],
    "tim": [],
    "ann": "developers",
    "bob": {"developers": True},
    "eve": [f"group {number}" for number in range(300)] + ["developers"],
}


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcProvider]:
    with oidc_provider(tmp_path_factory.mktemp("provider") / "idp") as provider:
        provider.groups = GROUPS
        yield provider


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, provider: OidcProvider) -> Iterator[ChatPage]:
    folder = tmp_path_factory.mktemp("chat")
    with served(folder, login=provider, aliases={"default": {"model": "echo"}}) as chat:
        yield chat


@pytest.fixture
def client(chat: ChatPage) -> Iterator[httpx.Client]:
    with chat.edge.client(None, **BROWSER) as client:
        yield client


def signed_in(client: httpx.Client, provider: OidcProvider, account: str) -> httpx.Response:
    """The page's answer to the browser that comes back."""
    begun = client.get("/page/provider")
    assert begun.status_code == 303
    back = urlsplit(provider.sign_in(begun.headers["location"], account))
    return client.get(back.path, params=dict(parse_qsl(back.query)))


def test_a_group_of_the_provider_is_a_role_of_the_policy(
    chat: ChatPage, provider: OidcProvider, client: httpx.Client
) -> None:
    assert signed_in(client, provider, "lea").status_code == 200
    assert "Signed in as lea" in client.get("/").text
    asked = client.post("/page/v1/chat/completions", json=ASKED, headers={"x-csrf-token": token(client)})
    assert asked.headers["x-llm-model"] == "echo"

    def records() -> list[dict[str, Any]]:
        request = asked.headers["x-request-id"]
        return [each for each in chat.gateway.records() if each.get("http.request.id") == request]

    for event in eventually("it is recorded", lambda: len(records()) == 2 and records()):
        assert (event["user.id"], event["organization.id"]) == ("lea", "corp")
        assert (event["llmkeep.identity.kind"], event["user.roles"]) == ("oidc", ["developer"])


@pytest.mark.parametrize("account", ["max", "tim"])
def test_groups_that_the_policy_does_not_name_give_nothing(
    provider: OidcProvider, client: httpx.Client, account: str
) -> None:
    assert signed_in(client, provider, account).status_code == 403
    assert client.get("/").status_code == 303


@pytest.mark.parametrize("account", ["ann", "bob", "eve"])
def test_groups_that_are_no_list_or_too_many_are_refused(
    provider: OidcProvider, client: httpx.Client, account: str
) -> None:
    assert signed_in(client, provider, account).status_code == 401
    assert client.get("/").status_code == 303


def test_the_provider_takes_a_code_by_its_own_verifier_alone(
    provider: OidcProvider, client: httpx.Client
) -> None:
    begun = client.get("/page/provider")
    back = dict(parse_qsl(urlsplit(provider.sign_in(begun.headers["location"], "lea")).query))
    state, _, began = str(client.cookies[COOKIE]).split(".")
    another = {"cookie": f"{COOKIE}={state}.{'x' * 64}.{began}"}
    client.cookies.clear()
    assert client.get("/page/signed-in", params=back, headers=another).status_code == 401


def test_a_new_key_of_the_provider_counts_once_it_is_brought_and_a_withdrawn_one_no_more(
    chat: ChatPage, provider: OidcProvider, client: httpx.Client
) -> None:
    assert signed_in(client, provider, "lea").status_code == 200
    provider.keys = {"two": ec.generate_private_key(ec.SECP256R1()), **provider.keys}
    provider.configure()
    with chat.edge.client(None, **BROWSER) as later:
        assert signed_in(later, provider, "lea").status_code == 401, "its key is not here yet"
        provider.bring_keys()
        eventually("the new key counts", lambda: signed_in(later, provider, "lea").status_code == 200)
        assert client.get("/").status_code == 200, "both keys count"
        del provider.keys["one"]
        provider.configure()
        provider.bring_keys()
        eventually("the session of the old key has ended", lambda: client.get("/").status_code == 303)
        assert later.get("/").status_code == 200
