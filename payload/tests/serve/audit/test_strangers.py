"""Refusals of unauthenticated callers: each address is recorded, and no flood fills the disk of the record."""

import json
from pathlib import Path
from typing import Any

import pytest
from service import running

from llmserve.audit.strangers import MOST_ADDRESSES, OTHERS, Strangers, source


def recorded(refusals: list[tuple[float, str]]) -> list[dict[str, Any]]:
    """What is recorded of refusals at these seconds from these addresses."""
    events: list[dict[str, Any]] = []
    strangers = Strangers(events.append)
    for now, address in refusals:
        strangers.add({"source.ip": address, "error.code": "invalid_key"}, now)
    strangers.flush()
    return events


def counts(events: list[dict[str, Any]]) -> dict[str, int]:
    return {
        each["llmkeep.audit.source"]: each["llmkeep.audit.count"]
        for each in events
        if "llmkeep.audit.count" in each
    }


def test_a_flood_from_one_address_is_two_records_a_minute() -> None:
    events = recorded([(120 + number / 100, "192.0.2.1") for number in range(12_000)])
    assert len(events) == 4
    assert [each.get("llmkeep.audit.count") for each in events] == [None, 5999, None, 5999]
    assert events[1]["llmkeep.audit.codes"] == {"invalid_key": 5999}


def test_a_flood_from_many_addresses_is_bounded_and_loses_no_count() -> None:
    events = recorded([(120.0, f"192.0.2.{number % 256}") for number in range(2_560)])
    assert len(events) <= 2 * (MOST_ADDRESSES + 1)
    assert sum(counts(events).values()) + sum("llmkeep.audit.count" not in each for each in events) == 2_560


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
    assert source(address) == name


def test_what_strangers_write_in_a_minute_is_bounded_and_counted_when_the_gateway_stops(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as service, service.client("llmk_000000000000_wrong") as wrong:
        for number in range(500):
            assert (
                wrong.get("/v1/models", headers={"x-forwarded-for": f"192.0.2.{number % 5}"}).status_code
                == 401
            )
        assert service.gateway
        service.gateway.stop()
        refused = [each for each in service.records() if each["llmkeep.audit.phase"] == "refused"]
    assert sum(each.get("llmkeep.audit.count", 1) for each in refused) == 500
    assert len(json.dumps(refused)) < 40_000, "644 bytes each were 322 KB; two minutes may have begun"
