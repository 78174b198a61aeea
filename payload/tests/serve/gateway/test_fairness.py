"""Fairness between tenants: one caller's flood is refused to that caller, and its neighbours are answered."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from authority import signed_bundle
from load import left_over, load
from service import Service, eventually, running

ENGINE = {"echo": {"driver": "echo", "token_seconds": 0.02, "slots": 4}}
LIMITS = {"waiting": 8, "queue_seconds": 5}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("fair"), ENGINE, limits=LIMITS) as service:
        yield service


def test_a_flood_of_one_subject_is_429_to_it_and_a_neighbour_is_answered(service: Service) -> None:
    neighbour = service.add_key("grace", "sales")["key"]
    idle = left_over(service)
    with load(service, 15, 50) as flood, service.client(neighbour) as client:
        eventually("the flood is refused", lambda: len(flood.refused_us) >= 15)
        for _ in range(5):
            answer = client.get("/generate", params={"prompt": "one two three four five"})
            assert answer.status_code == 200, answer.text
    assert set(flood.outcomes) == {"200", "429 too_many_waiting"}
    eventually("nothing is left over", lambda: left_over(service) == idle)


def test_a_colleague_is_answered_during_a_flood_of_another_subject_of_the_tenant(service: Service) -> None:
    colleague = service.add_key("grace", "research")["key"]
    with load(service, 15, 50) as flood, service.client(colleague) as client:
        eventually("the flood is refused", lambda: len(flood.refused_us) >= 15)
        assert client.get("/generate?prompt=one").status_code == 200


def test_a_refusal_beyond_ones_bound_says_when_to_retry(service: Service) -> None:
    with load(service, 15, 50) as flood, service.client() as client:
        eventually("the flood is refused", lambda: len(flood.refused_us) >= 15)

        def refused() -> httpx.Response | None:
            answer = client.get("/generate?prompt=one")
            return answer if answer.status_code == 429 else None

        answer = eventually("refused", refused)
    assert int(answer.headers["retry-after"]) >= 1
    assert "requests waiting" in answer.json()["error"]["message"]


def test_tenants_that_wait_are_served_by_the_weights_of_the_signed_policy(tmp_path: Path) -> None:
    """A weight of 3 gets three times as many answers of the same size."""
    bundle = tmp_path / "bundle.tar.gz"
    bundle.write_bytes(signed_bundle(tenants={"research": {"weight": 3}}))
    policy = {"engine": "embedded", "bundle": str(bundle)}
    one_slot = {"echo": {"driver": "echo", "token_seconds": 0.01, "slots": 1}}
    with running(tmp_path, one_slot, policy=policy) as service, ThreadPoolExecutor(17) as pool:
        other = service.add_key("grace", "sales")["key"]
        first = service.add_key("linus", "support")["key"]

        def ask(key: str, words: int) -> int:
            body = {"prompt": "word " * words, "max_tokens": 240}
            with service.client(key) as client:
                return client.post("/generate", json=body).status_code

        def waiting(number: int) -> None:
            eventually(
                f"{number} wait", lambda: service.metrics()['llm_requests_waiting{model="echo"}'] == number
            )

        answers = [pool.submit(ask, first, 240)]
        eventually("busy", lambda: service.metrics()['llm_requests_running{model="echo"}'] == 1)
        answers += [pool.submit(ask, service.key, 5) for _ in range(8)]
        waiting(8)
        answers += [pool.submit(ask, other, 5) for _ in range(8)]
        waiting(16)
        assert {each.result() for each in answers} == {200}
        eventually("recorded", lambda: len(outcomes(service)) == 17)
        assert [outcomes(service)[1:9].count(tenant) for tenant in ("research", "sales")] == [6, 2]


def outcomes(service: Service) -> list[str]:
    """The tenants of completed requests, in the order of their completion."""
    records = service.records()
    return [each["organization.id"] for each in records if each["llmkeep.audit.phase"] == "outcome"]
