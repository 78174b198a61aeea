"""Two hosts with pages under one name: peppers of their own, the estate's keys in common. A session of one is a session of the
other, and by the estate's keys alone there is none.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2 as httpx
import pytest
from chat_page import ChatPage, served, token
from operator_page import BROWSER, start
from provider_login import ProviderLogin, provider_login
from service import eventually

from llmserve.access.api_keys import edited, key_hash, new_key
from llmserve.access.estate_keys import CREDENTIAL
from llmweb.app import SESSION
from llmweb.sessions import COOKIE_BYTES, IDLE_SECONDS, RENEWAL_SECONDS, Sessions

OLD, NEW, OTHER = b"o" * 32, b"n" * 32, b"x" * 32
ONE, ADDED = f"current {OLD.hex()}\n", f"current {OLD.hex()}\nnext {NEW.hex()}\n"
SWITCHED = f"former {OLD.hex()}\ncurrent {NEW.hex()}\n"
PEPPERS = {"a": "a pepper of the first host, of 40 bytes.", "b": "the other host has a pepper of its own.."}
REDIRECT = "https://ask.estate.internal/page/signed-in"  # one for both
ASKED = {"model": "echo", "messages": [{"role": "user", "content": "the quick brown fox"}]}
CHAT = "/page/v1/chat/completions"
# The operator page shows here that no Prometheus answers.
NO_MONITORS = [dict.fromkeys(("prometheus", "alertmanager"), "http://127.0.0.1:9")]


@pytest.fixture(scope="module")
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderLogin]:
    with provider_login(tmp_path_factory.mktemp("provider") / "idp") as login:
        yield login


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, login: ProviderLogin) -> Iterator[list[ChatPage]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                served(
                    tmp_path_factory.mktemp(name),
                    {"echo": {"driver": "echo"}},
                    login,
                    {"monitors": NO_MONITORS, **login.settings(REDIRECT)},
                    credentials={"llm-gateway.pepper": pepper, CREDENTIAL: ONE},
                )
            )
            for name, pepper in PEPPERS.items()
        ]


def key_of(hosts: list[ChatPage], role: str = "developer") -> tuple[str, str]:
    """A new key that all hosts know, each by the hash of its own pepper, and its id."""
    key, record = new_key(b"", "ada", "research", [role], None)
    for host, pepper in zip(hosts, PEPPERS.values(), strict=True):
        with edited(host.gateway.folder / "keys.json") as records:
            records.append(record.model_copy(update={"hash": key_hash(pepper.encode(), key)}))
    return key, record.id


@contextmanager
def browser(hosts: list[ChatPage], cookie: str = "") -> Iterator[list[httpx.Client]]:
    """One browser, which reaches each host by the same name: a client for each, with cookies in common."""
    with ExitStack() as stack:
        clients = [stack.enter_context(host.edge.client(None, **BROWSER)) for host in hosts]
        for each in clients[1:]:
            each.cookies = clients[0].cookies.jar
        if cookie:
            clients[0].cookies.set(SESSION, cookie, domain="localhost.local")
        yield clients


@contextmanager
def signed_in(hosts: list[ChatPage], key: str = "") -> Iterator[list[httpx.Client]]:
    """A browser that has signed in at the first host."""
    with browser(hosts) as clients:
        answer = clients[0].post("/page/sign-in", data={"key": key or key_of(hosts)[0]})
        assert answer.status_code == 303, answer.text
        yield clients


def restart(host: ChatPage, keys: str = ONE) -> None:
    """Start the page anew, with these keys of the estate."""
    host.process.stop()
    (host.gateway.folder / "credentials" / CREDENTIAL).write_text(keys)
    host.process = start(host.gateway, host.config)


def statuses(clients: list[httpx.Client]) -> list[int]:
    return [each.get("/").status_code for each in clients]


def test_who_signed_in_at_one_host_goes_on_at_the_other(hosts: list[ChatPage]) -> None:
    with signed_in(hosts) as [first, other]:
        assert "Signed in as ada" in other.get("/").text
        asked = other.post(CHAT, json=ASKED, headers={"x-csrf-token": token(first)})
        assert asked.json()["choices"][0]["message"]["content"] == "the quick brown fox"


def test_an_operator_who_signed_in_at_one_host_sees_the_page_of_the_other(hosts: list[ChatPage]) -> None:
    with browser(hosts) as [first, other]:
        key, _ = key_of(hosts, "operator")
        assert first.post("/operator/sign-in", data={"key": key}).status_code == 303
        assert other.get("/operator/alerts").status_code == 200


def test_a_sign_in_at_the_provider_begins_at_one_host_ends_at_the_other_and_holds_at_both(
    hosts: list[ChatPage], login: ProviderLogin
) -> None:
    with browser(hosts) as [first, other]:
        assert provider_signed_in(other, login, begins=first).status_code == 200
        for each in first, other:
            csrf = token(each)
            assert each.post(CHAT, json=ASKED, headers={"x-csrf-token": csrf}).status_code == 200


def provider_signed_in(
    client: httpx.Client, login: ProviderLogin, begins: httpx.Client | None = None, **claims: Any
) -> httpx.Response:
    """The page's answer to a browser that comes back from the provider with a token of these claims. `begins`: of the host that
    sent it there.
    """
    begun = urlsplit((begins or client).get("/page/provider").headers["location"])
    back = urlsplit(login.authorize({name: value for name, [value] in parse_qs(begun.query).items()}))
    login.claims = claims
    try:
        return client.get(back.path, params=dict(parse_qs(back.query)))
    finally:
        login.claims = {}


def test_a_session_outlives_a_restart_of_the_page(hosts: list[ChatPage]) -> None:
    with signed_in(hosts) as clients:
        csrf = token(clients[0])
        restart(hosts[0])
        assert clients[0].post(CHAT, json=ASKED, headers={"x-csrf-token": csrf}).status_code == 200


def test_a_session_ends_at_the_host_where_its_key_is_revoked(hosts: list[ChatPage]) -> None:
    key, identifier = key_of(hosts)
    with signed_in(hosts, key) as clients:
        keys_file = str(hosts[1].gateway.folder / "keys.json")
        assert hosts[1].gateway.cli("keys", "revoke", identifier, "--keys-file", keys_file).returncode == 0
        eventually("the session has ended there", lambda: statuses(clients) == [200, 303])


def test_signing_out_takes_the_cookie_from_the_browser_and_ends_its_copies_at_that_host(
    hosts: list[ChatPage],
) -> None:
    with signed_in(hosts) as clients:
        copy = str(clients[0].cookies[SESSION])
        assert clients[0].post("/page/sign-out").status_code == 303
        assert SESSION not in clients[0].cookies
        assert statuses(clients) == [303, 303]
    with browser(hosts, copy) as clients:
        assert statuses(clients) == [303, 200], "docs/use/page.md states this limit"


def test_a_cookie_that_was_changed_or_is_of_another_estate_is_refused(hosts: list[ChatPage]) -> None:
    key, _ = key_of(hosts)
    ours = Sessions((OLD,)).open(key)
    middle = len(ours) // 2
    changed = ours[:middle] + ("A" if ours[middle] != "A" else "B") + ours[middle + 1 :]
    for cookie, status in (ours, 200), (changed, 303), (Sessions((OTHER,)).open(key), 303):
        with browser(hosts, cookie) as clients:
            assert statuses(clients) == [status] * 2


def test_the_estates_keys_alone_open_no_session(hosts: list[ChatPage]) -> None:
    """As root on a host of the estate could try for another host: all but the secret is known to it."""
    _, identifier = key_of(hosts)
    sealer = Sessions((OLD,))
    for cookie in sealer.open(f"llmk_{identifier}_{'0' * 48}"), sealer.open("", identifier), sealer.open(""):
        with browser(hosts, cookie) as clients:
            assert statuses(clients) == [303, 303]


def test_a_session_that_was_not_used_is_over_and_one_that_was_is_noted(hosts: list[ChatPage]) -> None:
    key, _ = key_of(hosts)
    sealer = Sessions((OLD,))

    def used(seconds: int) -> str:
        """A cookie of which the last use is so long ago."""
        content = sealer.ring.decrypt(sealer.open(key))
        return sealer.ring.encrypt_at_time(content, int(time.time()) - seconds).decode()

    with browser(hosts, used(IDLE_SECONDS + 1)) as clients:
        assert statuses(clients) == [303, 303]
    late = used(IDLE_SECONDS - RENEWAL_SECONDS)
    with browser(hosts, late) as [first, other]:
        page = first.get("/")
        noted = page.headers["set-cookie"]
        assert noted.lower().endswith("; httponly; path=/; samesite=strict; secure")
        assert sealer.find(str(other.cookies[SESSION])) == sealer.find(late)
        assert "set-cookie" not in other.get("/").headers, "within a minute"
    with browser(hosts, late) as [first, other]:
        csrf = token(first)
        first.cookies.set(SESSION, late, domain="localhost.local")
        answer = other.post(CHAT, json=ASKED, headers={"x-csrf-token": csrf})
        assert (answer.status_code, SESSION in answer.headers["set-cookie"]) == (200, True)


def test_a_token_that_fits_no_cookie_is_refused_with_its_size(
    hosts: list[ChatPage], login: ProviderLogin
) -> None:
    with browser(hosts) as [client, _]:
        fits = provider_signed_in(client, login, more=secrets.token_urlsafe(1900))
        assert fits.status_code == 200
        size = len(str(client.cookies[SESSION]))
        assert COOKIE_BYTES - 600 < size <= COOKIE_BYTES, "or the largest ones are not tried"
        assert client.get("/").status_code == 200
        client.cookies.clear()
        refused = provider_signed_in(client, login, more=secrets.token_urlsafe(3000))
        assert refused.status_code == 400
        assert "bytes, and" in refused.text
        assert (
            f"browsers only keep {COOKIE_BYTES}: have the identity provider put fewer groups" in refused.text
        )
        assert SESSION not in client.cookies


def test_sessions_go_on_while_the_estates_keys_are_rotated_and_end_with_the_second_rotation(
    hosts: list[ChatPage],
) -> None:
    try:
        with signed_in(hosts) as before:
            for keys in ADDED, SWITCHED:
                for host in hosts:
                    restart(host, keys)
                    assert statuses(before) == [200, 200]
                    order = [host, *(each for each in hosts if each is not host)]
                    with signed_in(order, key_of(hosts)[0]) as new:
                        assert statuses(new) == [200, 200]
        with browser(hosts, Sessions((OLD,)).open(key_of(hosts)[0])) as old:
            assert statuses(old) == [200, 200]
            for host in hosts:
                restart(host, f"current {NEW.hex()}\n")
            assert statuses(old) == [303, 303]
    finally:
        for host in hosts:
            restart(host)


def test_no_log_has_a_key_a_token_or_a_session(hosts: list[ChatPage], login: ProviderLogin) -> None:
    key, _ = key_of(hosts)
    with signed_in(hosts, key) as clients:
        statuses(clients)
        cookie = str(clients[0].cookies[SESSION])
        provider_signed_in(clients[1], login)
        statuses(clients)
    for host in hosts:
        logs = host.gateway.logs() + (host.edge.folder / "access.log").read_text()
        assert '"/"' in logs, "requests are logged"
        for secret in (key, key.split("_")[2], cookie, "gAAAA", "eyJ", OLD.hex()):
            assert secret not in logs
