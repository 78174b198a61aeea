"""The estate's keys: what hosts accept from each other, during a rotation and after it."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from questions import CHAT, GREEDY
from redis_server import PASSWORD, RedisServer
from service import Service, eventually, running

from llmserve.access.api_keys import KeyFileError
from llmserve.access.estate_keys import CREDENTIAL, Ring, derived, ring
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError
from llmserve.feedback.response_ids import ResponseIds

OLD, NEW, OTHER = b"o" * 32, b"n" * 32, b"x" * 32
ADA = Identity("api_key", "", "ada", "research", ())
ONE = f"current {OLD.hex()}\n"
ADDED = f"{ONE}next {NEW.hex()}\n"
SWITCHED = f"former {OLD.hex()}\ncurrent {NEW.hex()}\n"
PROMPT = "a question that Redis must not hold"


@pytest.mark.parametrize(
    ("text", "keys"),
    [(ONE, (OLD,)), (ADDED, (OLD, NEW)), (SWITCHED, (NEW, OLD))],
    ids=["one", "added", "switched"],
)
def test_the_current_key_issues_and_the_others_are_accepted(text: str, keys: Ring) -> None:
    assert ring(text) == keys


@pytest.mark.parametrize(
    "hosts", [(ONE, ADDED), (ADDED, SWITCHED), (ONE, ONE)], ids=["adding", "switching", "neither"]
)
def test_hosts_one_step_of_a_rotation_apart_accept_each_others_ids(hosts: tuple[str, str]) -> None:
    one, other = map(ring, hosts)
    for issuer, verifier in (one, other), (other, one):
        identifier = ResponseIds(issuer).issue("5e" * 8, ADA)
        assert ResponseIds(verifier).verify(identifier, ADA).transaction == "5e" * 8


def test_an_id_by_a_key_outside_the_ring_is_refused() -> None:
    with pytest.raises(ApiError, match="response_not_found"):
        ResponseIds(ring(SWITCHED)).verify(ResponseIds((OTHER,)).issue("5e" * 8, ADA), ADA)


def test_keys_for_two_purposes_have_nothing_in_common() -> None:
    assert not set(derived((OLD, NEW), "response id")) & {*derived((OLD, NEW), "cache salt"), OLD, NEW}


@pytest.mark.parametrize(
    "text",
    ["", f"next {NEW.hex()}", f"{ONE}{ONE}", f"{ONE}spare {NEW.hex()}", "current", "current xyz", OLD.hex()],
)
def test_a_credential_that_is_no_ring_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(
        KeyFileError, match=rf"the credential {CREDENTIAL} is not .* run site\.yml"
    ) as refused:
        ring(text)
    assert OLD.hex() not in str(refused.value)


def test_a_short_key_is_refused_with_its_length() -> None:
    with pytest.raises(KeyFileError, match="has a 'next' key of 31 bytes: 32 are needed"):
        ring(f"{ONE}next {NEW.hex()[:-2]}")


@pytest.fixture
def hosts(redis_server: RedisServer, tmp_path: Path) -> Iterator[list[Service]]:
    """Two hosts: the first issues by the old key, the second by the new one. Each has a pepper and a journal of its own."""
    redis = {**redis_server.settings, "deadline_ms": 5000}
    with ExitStack() as stack:
        services = []
        for name, text in ("one", ADDED), ("other", SWITCHED):
            folder = tmp_path / name
            (folder / "journal").mkdir(parents=True)
            secrets = {"redis.gateway": PASSWORD, CREDENTIAL: text, "llm-gateway.pepper": name * 16}
            feedback = {"folder": str(folder / "journal")}
            services.append(
                stack.enter_context(running(folder, redis=redis, credentials=secrets, feedback=feedback))
            )
        yield services


def test_an_answer_of_one_host_is_rated_at_each_and_redis_has_no_prompt(
    hosts: list[Service], redis_server: RedisServer
) -> None:
    keys = [host.add_key()["key"] for host in hosts]
    with redis_server.client() as store:
        store.flushall()
        with hosts[0].client(keys[0]) as client:
            answer = client.post(CHAT, json={**GREEDY, "messages": [{"role": "user", "content": PROMPT}]})
        eventually("it is cached", lambda: store.keys("llm:*:exact:*"))
        [name] = store.keys("llm:*:exact:*")
        assert PROMPT.encode() not in (store.get(name) or b"")
    rating = {"id": answer.headers["x-llm-response-id"], "thumb": "up"}
    for host, key in zip(hosts, keys, strict=True):
        with host.client(key) as client:
            assert client.post("/v1/feedback", json=rating).status_code == 200
