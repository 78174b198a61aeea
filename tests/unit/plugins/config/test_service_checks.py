"""The questions that are asked of each service."""

from typing import Any

import pytest
from plugin_modules import load

ask = load("filter.service_checks").with_service_checks

REDIS = {"service": "redis", "title": "Redis", "units": ["redis-server.service"]}


def asked(**given: Any) -> dict[str, dict[str, Any]]:
    return {check["id"]: check for check in ask([REDIS | given], "EXPOSURE", "RESTRICTIONS")}


def test_a_service_is_asked_for_all_but_a_limit_that_was_not_declared() -> None:
    assert list(asked()) == [
        "redis.runs",
        "redis.returns_after_a_reboot",
        "redis.addresses_are_filtered",
        "redis.units_are_hardened",
        "redis.restrictions_hold",
    ]
    assert asked()["redis.units_are_hardened"]["argv"] == [
        "sh",
        "-c",
        "EXPOSURE",
        "check",
        "redis-server.service=15",
    ]


def test_a_number_is_of_all_units_and_a_dictionary_of_those_that_it_names() -> None:
    units = ["munge.service", "slurmd.service"]
    both = asked(units=units, memory=1024)["redis.memory_is_bounded"]
    assert both["units"] == {"munge.service": 1024, "slurmd.service": 1024}
    one = asked(units=units, memory={"slurmd.service": 1024}, filtered=["munge.service"])
    assert one["redis.memory_is_bounded"]["units"] == {"slurmd.service": 1024}
    assert one["redis.addresses_are_filtered"]["units"] == {"munge.service": "any"}
    assert one["redis.runs"]["stdout"] == "active\nactive"


def test_each_process_has_the_capabilities_that_are_declared_for_its_unit() -> None:
    masks = {"munge.service": "0" * 16, "slurmd.service": "00000000000000eb"}
    check = asked(units=list(masks), capabilities=masks)["redis.restrictions_hold"]
    assert check["argv"] == ["sh", "-c", "RESTRICTIONS", "check", "munge.service", "slurmd.service"]
    assert check["stdout"].splitlines() == [
        "CapBnd: 0000000000000000 NoNewPrivs: 1 Seccomp: 2",
        "CapBnd: 00000000000000eb NoNewPrivs: 1 Seccomp: 2",
    ]


@pytest.mark.parametrize(
    ("given", "unasked"),
    [({"exposure": 0}, "redis.units_are_hardened"), ({"filtered": []}, "redis.addresses_are_filtered")],
)
def test_what_is_ruled_out_is_not_asked(given: dict[str, Any], unasked: str) -> None:
    assert unasked not in asked(**given)


def test_a_part_of_a_role_has_its_name_in_its_ids_and_other_checks_stay_as_they_are() -> None:
    other = {"id": "edge.refuses_tls_1_2", "title": "TLS 1.2 is refused", "argv": ["true"]}
    made = ask([other, REDIS | {"service": "edge.hsm"}])
    assert made[0] == other
    assert made[1]["id"] == "edge.hsm_runs"
