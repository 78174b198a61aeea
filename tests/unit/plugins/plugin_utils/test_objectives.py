"""Objectives as data: what is refused, and the numbers of the rules."""

from copy import deepcopy
from typing import Any

import pytest
from plugin_modules import load

objectives = load("plugin_utils.objectives")
ONE = {
    "name": "Fast",
    "title": "answers in time",
    "objective": 0.99,
    "good": 'a_bucket{le="0.5"}',
    "all": "a_count",
    "runbook": "slow",
}
SLO = {"days": 30, "low_traffic": {"requests": 20, "bad": 5}, "objectives": [ONE]}
ALERT = {"alert": "Down", "expr": "up == 0", "severity": "page", "summary": "it is down", "runbook": "down"}


def rules_of(slo: Any) -> dict[str, str]:
    made = objectives.prometheus_rules(slo, [], [], "https://docs.example")
    return {
        rule.get("alert") or rule["record"]: rule["expr"]
        for group in made["groups"]
        for rule in group["rules"]
    }


def test_burn_rates_are_those_of_the_workbook_for_30_days() -> None:
    rules = rules_of(SLO)
    limits = {
        name: rules[name].split("\n")[0].split(" > ")[1]
        for name in ("FastBurn1h", "FastBurn6h", "FastBurn1d", "FastBurn3d")
    }
    assert limits == {"FastBurn1h": "0.144", "FastBurn6h": "0.06", "FastBurn1d": "0.03", "FastBurn3d": "0.01"}


def test_a_week_is_less_patient_with_the_same_share_of_its_budget() -> None:
    assert rules_of(SLO | {"days": 7})["FastBurn6h"].startswith(
        'slo:bad:ratio_rate6h{objective="Fast"} > 0.014\n'
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"objective": 99}, "objective 'Fast': objective is 99: take a share between 0 and 1, such as 0.99"),
        ({"objective": True}, "objective is True"),
        ({"name": "not a name"}, "take letters and digits that begin with a capital"),
        ({"bad": "a_bad"}, "needs either good or bad"),
        ({"good": "sum(a_bucket)"}, "write one selector of a counter"),
        (
            {"gooood": "a"},
            "has the unknown keys gooood: known are all, bad, by, good, name, objective, runbook, title",
        ),
        ({"all": None}, "all is None"),
        (
            {"objective": 0.9},
            "its alert for 1h would fire above 144 % of bad events: take a higher objective, or fewer days",
        ),
        ({"by": "model"}, "objective 'Fast': by is 'model': write a list of labels, such as [model]"),
        ({"by": ["model) or up"]}, "write a list of labels"),
    ],
)
def test_a_wrong_objective_is_refused_with_its_value(change: dict[str, Any], told: str) -> None:
    with pytest.raises(objectives.ObjectiveError) as refused:
        rules_of(SLO | {"objectives": [ONE | change]})
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"days": 365}, "days is 365: take 7 to 90"),
        ({"low_traffic": {"requests": 5, "bad": 20}}, "bad has to be between 1 and requests"),
        ({"low_traffic": 20}, "low_traffic is 20: write a mapping with the keys bad, requests"),
        (
            {"low_traffic": {"requests": "20", "bad": 5}},
            "low_traffic: requests is '20': take a whole number",
        ),
        ({"low_traffic": {"requests": 20, "bad": True}}, "low_traffic: bad is True: take a whole number"),
        ({"objectives": None}, "objectives is None: write a list, which may be empty: []"),
        ({"objectives": [ONE, ONE]}, "objective 'Fast' is there twice"),
        ({"objectives": ["Fast"]}, "objective 1 is 'Fast': write a mapping"),
        (
            {"utilisation": {"low": 0.9, "high": 0.7, "busy": "b", "waiting": "w", "runbook": "r"}},
            "low is 0.9 and high is 0.7: low must be lower",
        ),
        ({"utilisation": {"low": 0.7}}, "utilisation lacks busy, high, runbook, waiting"),
    ],
)
def test_wrong_data_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(objectives.ObjectiveError) as refused:
        rules_of(deepcopy(SLO) | change)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"severity": "critical"}, "alert Down: severity is 'critical': take one of page, ticket"),
        ({"label": "x"}, "alert Down has the unknown keys label"),
    ],
)
def test_a_wrong_alert_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(objectives.ObjectiveError) as refused:
        objectives.prometheus_rules(SLO, [ALERT | change], [], "https://docs.example")
    assert told in str(refused.value)


def test_an_objective_that_is_too_low_for_a_month_will_do_for_a_week() -> None:
    low = SLO | {"objectives": [ONE | {"objective": 0.9}]}
    assert rules_of(low | {"days": 7})["FastBurn1h"].startswith(
        'slo:bad:ratio_rate1h{objective="Fast"} > 0.336\n'
    )


def test_every_fault_is_told_at_once() -> None:
    faults = objectives.slo_faults(SLO | {"objectives": [ONE | {"objective": 2, "name": "x y"}]})
    assert len(faults) == 2


def test_an_alert_has_a_severity_and_a_link_into_the_runbooks() -> None:
    made = objectives.prometheus_rules(SLO, [ALERT], ["node"], "https://docs.example/metrics.md")
    rule = next(rule for group in made["groups"] for rule in group["rules"] if rule.get("alert") == "Down")
    assert rule["labels"] == {"severity": "page"}
    assert rule["annotations"] == {
        "summary": "it is down",
        "runbook_url": "https://docs.example/metrics.md#down",
    }
