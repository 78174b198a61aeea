"""Prometheus rules from data: objectives (slo.yml), alerts (alerts.yml) and the sources that have to be there.

Windows and factors are Google's for an objective of 30 days, as sloth has them (google-30d): a page when 2 % of the budget
of errors goes in 1 h or 5 % in 6 h, a ticket when 10 % goes in 1 or 3 days; a short window ends the alert soon after the fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Rule = dict[str, Any]

# Long and short window, share of the budget that goes in the long one, severity.
WINDOWS = (
    ("1h", "5m", 0.02, "page"),
    ("6h", "30m", 0.05, "page"),
    ("1d", "2h", 0.1, "ticket"),
    ("3d", "6h", 0.1, "ticket"),
)
HOURS = {"1h": 1, "6h": 6, "1d": 24, "3d": 72}
FEW = "6h"  # the window of the branch for low traffic
SEVERITIES = ("page", "ticket", "none")
SELECTOR = re.compile(r"[a-z_:][a-z0-9_:]*(\{[^{}]*\})?")
NAME = re.compile(r"[A-Z][A-Za-z0-9]+")
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
OBJECTIVE_KEYS = {"name", "title", "objective", "all", "runbook"}
ALERT_KEYS = {"alert", "expr", "severity", "summary", "runbook"}
UTILISATION_KEYS = {"low", "high", "busy", "waiting", "runbook"}


class ObjectiveError(Exception):
    """What is wrong with slo.yml or alerts.yml, a sentence each."""


def _keys(where: str, mapping: Any, required: set[str], optional: set[str]) -> Iterator[str]:
    if not isinstance(mapping, Mapping):
        yield f"{where} is {mapping!r}: write a mapping with the keys {', '.join(sorted(required))}"
        return
    if missing := required - set(mapping):
        yield f"{where} lacks {', '.join(sorted(missing))}: add them"
    if unknown := set(mapping) - required - optional:
        known = ", ".join(sorted(required | optional))
        yield f"{where} has the unknown keys {', '.join(map(str, sorted(unknown)))}: known are {known}"


def _share(where: str, key: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        yield f"{where}: {key} is {value!r}: take a share between 0 and 1, such as 0.99"


def _objective_faults(number: int, entry: Any, days: int) -> Iterator[str]:
    where = f"objective {number}"
    faults = list(_keys(where, entry, OBJECTIVE_KEYS, {"good", "bad", "by"}))
    yield from faults
    if faults:
        return
    where = f"objective {entry['name']!r}"
    if not NAME.fullmatch(str(entry["name"])):
        yield f"{where}: the name is a part of names of alerts: take letters and digits that begin with a capital"
    faults = list(_share(where, "objective", entry["objective"]))
    faults = faults or [fault for window in WINDOWS for fault in _burn_faults(where, entry, days, window)]
    yield from faults
    by = entry.get("by", [])
    if not isinstance(by, list) or not all(isinstance(label, str) and LABEL.fullmatch(label) for label in by):
        yield f"{where}: by is {by!r}: write a list of labels, such as [model]"
    if ("good" in entry) == ("bad" in entry):
        yield f"{where} needs either good or bad: the selector of the events that count as such"
    for key in {"good", "bad", "all"} & set(entry):
        if not SELECTOR.fullmatch(str(entry[key])):
            yield f'{where}: {key} is {entry[key]!r}: write one selector of a counter, such as llm_requests_total{{status="503"}}'


def _burn_faults(
    where: str, objective: Mapping[str, Any], days: int, window: tuple[str, str, float, str]
) -> Iterator[str]:
    """Of an alert that would need more bad events than there are events."""
    share = _burn(days, window) * (1 - objective["objective"])
    if share >= 1:
        yield (
            f"{where}: objective is {objective['objective']!r} in {days} days, so its alert for {window[0]} would fire above "
            f"{_number(100 * share)} % of bad events: take a higher objective, or fewer days"
        )


def slo_faults(slo: Any) -> list[str]:
    """What is wrong with the data of slo.yml; nothing if it is right."""
    faults = list(_keys("slo.yml", slo, {"days", "low_traffic", "objectives"}, {"utilisation"}))
    if faults:
        return faults
    if slo["days"] not in range(7, 91):
        faults.append(f"days is {slo['days']!r}: take 7 to 90, the window that an objective is kept in")
    days = 30 if faults else slo["days"]  # the usual ones, to judge the rest by
    few = slo["low_traffic"]
    problems = list(_keys("low_traffic", few, {"requests", "bad"}, set()))
    problems = problems or [
        f"low_traffic: {key} is {few[key]!r}: take a whole number"
        for key in ("requests", "bad")
        if isinstance(few[key], bool) or not isinstance(few[key], int)
    ]
    if not problems and not 0 < few["bad"] <= few["requests"]:
        problems.append(f"low_traffic is {few!r}: bad has to be between 1 and requests")
    faults += problems
    if not isinstance(slo["objectives"], list):
        return [*faults, f"objectives is {slo['objectives']!r}: write a list, which may be empty: []"]
    for number, objective in enumerate(slo["objectives"], 1):
        faults += _objective_faults(number, objective, days)
    names = [objective.get("name") for objective in slo["objectives"] if isinstance(objective, Mapping)]
    faults += [
        f"objective {name!r} is there twice: rename one"
        for name in sorted({str(n) for n in names if names.count(n) > 1})
    ]
    if "utilisation" in slo:
        band = slo["utilisation"]
        problems = list(_keys("utilisation", band, UTILISATION_KEYS, set()))
        problems = problems or [
            fault for key in ("low", "high") for fault in _share("utilisation", key, band[key])
        ]
        if not problems and not band["low"] < band["high"]:
            problems.append(
                f"utilisation: low is {band['low']} and high is {band['high']}: low must be lower"
            )
        faults += problems
    return faults


def alert_faults(alerts: Any) -> list[str]:
    """What is wrong with the data of alerts.yml."""
    faults = []
    for number, alert in enumerate(alerts, 1):
        where = f"alert {alert['alert'] if isinstance(alert, Mapping) and 'alert' in alert else number}"
        problems = list(_keys(where, alert, ALERT_KEYS, {"for"}))
        if not problems and alert["severity"] not in SEVERITIES:
            problems.append(
                f"{where}: severity is {alert['severity']!r}: take one of {', '.join(SEVERITIES)}"
            )
        faults += problems
    return faults


def _number(value: float) -> str:
    """A threshold as Prometheus reads it, without the noise of binary fractions."""
    return f"{value:.10g}"


def _burn(days: int, window: tuple[str, str, float, str]) -> float:
    """How many times too fast the budget of `days` goes when its share for this window goes in it."""
    long, _, share, _ = window
    return share * days * 24 / HOURS[long]


def _summed(by: list[str], expr: str) -> str:
    return f"sum by ({', '.join(by)}) ({expr})" if by else f"sum({expr})"


def _recordings(objective: Mapping[str, Any]) -> Iterator[Rule]:
    """The share of bad events by window, and the numbers of all and bad events that guards look at."""
    by, labels = list(objective.get("by", [])), {"objective": objective["name"]}

    def total(key: str, function: str, window: str) -> str:
        return _summed(by, f"{function}({objective[key]}[{window}])")

    for window in dict.fromkeys(name for pair in WINDOWS for name in pair[:2]):
        if "bad" in objective:
            expr = f"{total('bad', 'rate', window)} / {total('all', 'rate', window)}"
        else:
            expr = f"1 - {total('good', 'rate', window)} / {total('all', 'rate', window)}"
        yield {"record": f"slo:bad:ratio_rate{window}", "expr": expr, "labels": labels}
    for window in HOURS:
        yield {
            "record": f"slo:all:increase{window}",
            "expr": total("all", "increase", window),
            "labels": labels,
        }
    bad = (
        total("bad", "increase", FEW)
        if "bad" in objective
        else f"{total('all', 'increase', FEW)} - {total('good', 'increase', FEW)}"
    )
    yield {"record": f"slo:bad:increase{FEW}", "expr": bad, "labels": labels}


def _budget_alerts(objective: Mapping[str, Any], slo: Mapping[str, Any]) -> Iterator[Rule]:
    """One alert a pair of windows, one for traffic too low for them, one for an objective whose events are gone."""
    name, title, runbook = objective["name"], objective["title"], objective["runbook"]
    selector, few = f'{{objective="{name}"}}', slo["low_traffic"]
    whose = "{{ with $labels.model }} for {{ . }}{{ end }}"
    for window in WINDOWS:
        long, short, _, severity = window
        factor = _burn(slo["days"], window)
        limit = _number(factor * (1 - objective["objective"]))
        yield {
            "alert": f"{name}Burn{long}",
            "expr": f"slo:bad:ratio_rate{long}{selector} > {limit}\nand\nslo:bad:ratio_rate{short}{selector} > {limit}\n"
            f"and\nslo:all:increase{long}{selector} >= {few['requests']}",
            "severity": severity,
            "runbook": runbook,
            "summary": f"{{{{ $value | humanizePercentage }}}} are not {title}{whose} in {long}; "
            f"promised are {objective['objective']:.10g}, and the budget of {slo['days']} days goes "
            f"{_number(factor)} times too fast",
        }
    yield {
        "alert": f"{name}FewRequests",
        "expr": f"slo:bad:increase{FEW}{selector} >= {few['bad']}\nand\nslo:all:increase{FEW}{selector} < {few['requests']}",
        "severity": "page",
        "runbook": runbook,
        "summary": f"{{{{ $value | humanize }}}} of few requests are not {title}{whose} in {FEW}",
    }
    yield {
        "alert": f"{name}WithoutData",
        "expr": f"absent({objective['all']})",
        "for": "10m",
        "severity": "ticket",
        "runbook": "no-data",
        "summary": f"No gateway exports {objective['all'].partition('{')[0]}, so nothing watches objective {name}",
    }


def _utilisation_alerts(band: Mapping[str, Any]) -> Iterator[Rule]:
    """Both sides of the band, for hosts where requests waited for most of the hour."""
    demand = "and on (instance)\navg_over_time(instance:llm_demand:bool[1h]) > 0.5"
    for name, sign, limit, advice in (
        ("GpuIdleUnderDemand", "<", band["low"], "the engine takes too few requests at once"),
        ("GpuSaturated", ">", band["high"], "this host is full"),
    ):
        yield {
            "alert": name,
            "expr": f"avg_over_time({band['busy']}[1h]) {sign} {_number(limit)}\n{demand}",
            "for": "1h",
            "severity": "ticket",
            "runbook": band["runbook"],
            "summary": "GPU {{ $labels.gpu }} of {{ $labels.instance }} was busy "
            "{{ $value | humanizePercentage }} of an hour in which "
            f"requests waited: {advice}",
        }


def _source_alerts(jobs: list[str]) -> Iterator[Rule]:
    for job in jobs:
        yield {
            "alert": f"NoSource{job.title().replace('_', '')}",
            "expr": f'absent(up{{job="{job}"}})',
            "for": "10m",
            "severity": "page",
            "runbook": "no-data",
            "summary": f"Prometheus has no target of {job}, so none of its alerts can fire",
        }


def _as_prometheus(rule: Rule, runbooks: str) -> Rule:
    """An alert of ours as Prometheus reads it: `runbooks` is the page that anchors are on."""
    if "record" in rule:
        return rule
    alert = {"alert": rule["alert"], "expr": rule["expr"].strip()}
    if "for" in rule:
        alert["for"] = rule["for"]
    return alert | {
        "labels": {"severity": rule["severity"]},
        "annotations": {"summary": rule["summary"], "runbook_url": f"{runbooks}#{rule['runbook']}"},
    }


def prometheus_rules(
    slo: Mapping[str, Any], alerts: list[Rule], jobs: list[str], runbooks: str
) -> dict[str, Any]:
    """Content of a rules file of Prometheus. Raises ObjectiveError with every fault of the data.

    `jobs`: names of the jobs that must have a target. `runbooks`: address of the page that every alert links into.
    """
    if faults := slo_faults(slo) + alert_faults(alerts):
        raise ObjectiveError(". ".join(faults))
    groups: dict[str, list[Rule]] = {"sources": list(_source_alerts(jobs)), "alerts": list(alerts)}
    for objective in slo["objectives"]:
        groups[f"objective {objective['name']}"] = [*_recordings(objective), *_budget_alerts(objective, slo)]
    if "utilisation" in slo:
        demand = f"clamp_max(sum by (instance) ({slo['utilisation']['waiting']}), 1)"
        groups["utilisation"] = [
            {"record": "instance:llm_demand:bool", "expr": demand},
            *_utilisation_alerts(slo["utilisation"]),
        ]
    named = {name: [_as_prometheus(rule, runbooks) for rule in rules] for name, rules in groups.items()}
    return {"groups": [{"name": name, "rules": rules} for name, rules in named.items() if rules]}
