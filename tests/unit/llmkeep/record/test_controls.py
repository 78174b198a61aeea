"""controls/*.yml: what controls name is there, and each check of the roles has a control, or a line that says it has none."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import roledoc
import yaml

from llmkeep.errors import LlmkeepError
from llmkeep.record import standards

ROOT = Path(__file__).resolve().parents[4]
CHECKS = [check["id"] for role in roledoc.ROLES for check in roledoc.checks(role)]
LISTS: dict[str, Any] = yaml.safe_load((ROOT / "controls/checks.yml").read_text())
NAMES = standards.names(ROOT)
NUMBERS_ALONE = ["gb-t-22239", "iso-27001"]


def controls(name: str) -> list[dict[str, Any]]:
    return list(standards.read(ROOT, name)["controls"])


def test_the_standards_are_these() -> None:
    assert NAMES == ["anssi-bp-028", "cis-debian13", "gb-t-22239", "iso-27001", "nist-800-53"]


def test_an_unknown_standard_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(LlmkeepError, match=r"no standard '\.\./meta/features': choose one of anssi-bp-028, "):
        standards.read(ROOT, "../meta/features")


@pytest.mark.parametrize("name", NAMES)
def test_no_control_is_there_twice(name: str) -> None:
    assert [each for each, times in Counter(c["id"] for c in controls(name)).items() if times > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_check_that_a_control_names_is_one_of_a_role(name: str) -> None:
    assert {check for control in controls(name) for check in control.get("checks", [])} - {*CHECKS} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_control_names_each_check_once(name: str) -> None:
    twice = [c["id"] for c in controls(name) if len({*c.get("checks", [])}) < len(c.get("checks", []))]
    assert twice == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NUMBERS_ALONE])
def test_a_control_has_a_title_and_either_checks_or_the_organisation_or_a_reason(name: str) -> None:
    wrong = [
        c["id"]
        for c in controls(name)
        if not c.get("title") or sum(key in c for key in ("checks", "organisation", "missing")) != 1
    ]
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_that_the_report_reads(name: str) -> None:
    standard = standards.read(ROOT, name)
    assert standard.keys() - {"unreviewed"} == {
        "id", "title", "version", "source", "reviewed_by", "controls",
    }  # fmt: skip
    fields = {"id", "title", "checks", "organisation", "missing", "partly", "source"}
    assert {key for control in standard["controls"] for key in control} <= fields


@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_said_to_have_reviewed_it_until_a_person_has(name: str) -> None:
    assert standards.read(ROOT, name)["reviewed_by"] == "nobody"


@pytest.mark.parametrize("name", NUMBERS_ALONE)
def test_standards_whose_text_nobody_compared_are_numbers_alone(name: str) -> None:
    assert standards.read(ROOT, name)["unreviewed"] is True
    assert {key for control in controls(name) for key in control} == {"id"}


def test_each_check_of_a_role_has_a_control_or_a_line_that_says_it_has_none() -> None:
    without = [check for checks in LISTS["without_control"].values() for check in checks]
    named = {check for name in NAMES for control in controls(name) for check in control.get("checks", [])}
    assert Counter([*named, *without]) == Counter(CHECKS)


def test_conditional_checks_are_checks_of_roles() -> None:
    assert {*standards.conditional(ROOT)} - {*CHECKS} == set()
    assert len(LISTS["conditional"]) == len({*LISTS["conditional"]})
