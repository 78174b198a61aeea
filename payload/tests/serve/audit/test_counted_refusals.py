"""Refusals, of strangers and of known callers: each is on the record, and no flood of them fills its disk."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from service import Service, running

from llmserve.audit.refusals import OTHERS, Refusals, network

SOURCES = 32


def recorded(refusals: list[tuple[float, str, str]], singly: int = 1) -> list[dict[str, Any]]:
    """What is recorded of refusals at these seconds, by these sources, for these reasons."""
    events: list[dict[str, Any]] = []
    counts = Refusals(events.append, SOURCES, singly, 2 * SOURCES)
    for now, by, code in refusals:
        counts.add({"error.code": code, "user.id": by}, {"user.id": by}, now)
    counts.flush()
    return events


def total(events: list[dict[str, Any]]) -> int:
    """Number of refusals, recorded singly or counted."""
    return sum(each.get("llmkeep.audit.count", 1) for each in events)


def test_a_flood_of_one_source_is_two_records_a_minute() -> None:
    events = recorded([(120 + number / 100, "ada", "invalid_key") for number in range(12_000)])
    assert len(events) == 4
    assert [each.get("llmkeep.audit.count") for each in events] == [None, 5999, None, 5999]
    assert events[1]["llmkeep.audit.codes"] == {"invalid_key": 5999}
    assert {each["user.id"] for each in events} == {"ada"}


def test_a_flood_for_one_reason_does_not_hide_another() -> None:
    flood = [(120.0, "ada", "unknown_path")] * 1000
    events = recorded([*flood, (120.0, "ada", "denied"), *flood], singly=3)
    assert [each.get("error.code") for each in events] == ["unknown_path"] * 3 + ["denied", None]
    assert total(events) == 2001


def test_a_flood_of_many_sources_is_bounded_and_loses_no_count() -> None:
    events = recorded([(120.0, f"subject {number % 256}", f"code {number % 3}") for number in range(2_560)])
    assert len(events) <= 3 * SOURCES + 1
    assert total(events) == 2_560
    assert any(each.get("llmkeep.audit.source") == OTHERS for each in events)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        (None, OTHERS),
        ("unix:", OTHERS),
        ("x" * 64, OTHERS),
    ],
)
def test_an_address_counts_as_what_one_caller_can_use(address: object, name: str) -> None:
    assert network(address) == name


def refused_records(service: Service) -> list[dict[str, Any]]:
    """All refusals on the record once the gateway has stopped."""
    assert service.gateway
    service.gateway.stop()
    return [each for each in service.records() if each["llmkeep.audit.phase"] == "refused"]


def test_what_strangers_write_in_a_minute_is_bounded_and_counted_when_the_gateway_stops(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as service, service.client("llmk_000000000000_wrong") as wrong:
        for number in range(500):
            headers = {"x-forwarded-for": f"192.0.2.{number % 5}"}
            assert wrong.get("/v1/models", headers=headers).status_code == 401
        refused = refused_records(service)
    assert total(refused) == 500
    assert len(json.dumps(refused)) < 40_000, "644 bytes each were 322 KB; two minutes may have begun"


def test_ten_thousand_refusals_of_one_key_are_a_few_records_that_name_the_caller(tmp_path: Path) -> None:
    """Unknown paths count against no quota; an unknown model and a denied action are refused for other reasons."""
    with running(tmp_path) as service:
        with service.client() as client:
            for number in range(10_000):
                assert client.get(f"/nowhere/{number}").status_code == 404
            for _ in range(50):
                chat = {"model": "gpt-4", "messages": [{"role": "user", "content": "x"}]}
                assert client.post("/v1/chat/completions", json=chat).status_code == 404
        refused = refused_records(service)
    assert total(refused) == 10_050
    assert {(each["user.id"], each["organization.id"]) for each in refused} == {("ada", "research")}
    counted = Counter[str]()
    for each in refused:
        counted.update(each.get("llmkeep.audit.codes") or {each["error.code"]: 1})
    assert counted == {"unknown_path": 10_000, "model_not_found": 50}
    size = len("".join(json.dumps(each) + "\n" for each in refused))
    print(f"{size} bytes in {len(refused)} records")  # figures.md
    assert size < 20_000, "800 bytes each were 8 MB; a few minutes may have begun"
