"""Each rule of role prometheus: a case in which it fires, one in which it does not, and no mutant that passes both.

promtool runs all of it in one call. A rule's mutants are further rules of the same file, under the rule's name and a number.
"""

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT, load
from promql_mutants import mutants

objectives = load("plugin_utils.objectives")
FILES = ROOT / "roles/prometheus/files"
SLO = yaml.safe_load((ROOT / "roles/_common/files/slo.yml").read_text())
ALERTS = yaml.safe_load((FILES / "alerts.yml").read_text())
CASES = yaml.safe_load((Path(__file__).parent / "alert_cases.yml").read_text())
RULES = objectives.prometheus_rules(SLO, ALERTS, ["gateway"], "https://docs.example/metrics.md")
EVERY = [rule for group in RULES["groups"] for rule in group["rules"]]
RECORDS = {
    (rule["record"], rule.get("labels", {}).get("objective", "")): rule for rule in EVERY if "record" in rule
}
MINUTES = {"m": 1, "h": 60, "d": 1440}
# The workbook's table of burn rates: the factor, the long and the short window.
BURNS = {
    "Burn1h": (14.4, 60, 5),
    "Burn6h": (6.0, 360, 30),
    "Burn1d": (3.0, 1440, 120),
    "Burn3d": (1.0, 4320, 360),
}
Series = dict[str, str]
Steps = list[
    tuple[float, float, float]
]  # so many steps, with so many requests each, of which so many are bad


@dataclass
class Case:
    """Input, and what to find: an expression with its value (None: no result) at a minute."""

    series: Series
    step: float  # minutes between two samples
    found: list[tuple[str, float, float | None]] = field(default_factory=list)


@dataclass
class RuleTest:
    """One rule with its mutants, and the cases that all of them have to tell apart."""

    rule: dict[str, Any]
    variants: list[str]
    cases: list[Case]
    needs: list[dict[str, Any]] = field(default_factory=list)  # recording rules that it reads

    @property
    def name(self) -> str:
        objective = self.rule.get("labels", {}).get("objective", "")
        return "-".join(filter(None, [self.rule.get("alert") or self.rule["record"], objective]))


def cumulated(steps: Steps, take: Any) -> str:
    """Samples of a counter that grows by `take` of each step."""
    total, samples = 0.0, [0.0]
    for number, requests, bad in steps:
        for _ in range(round(number)):
            total += take(requests, bad)
            samples.append(total)
    return " ".join(f"{value:.10g}" for value in samples)


def series_of(objective: str, steps: Steps) -> Series:
    """What gateways export of this traffic, and beside it what must not be taken for it."""
    everything = cumulated(steps, lambda requests, _: requests)
    good = cumulated(steps, lambda requests, bad: requests - bad)
    bad_ones = cumulated(steps, lambda _, bad: bad)
    half = cumulated(steps, lambda requests, _: requests / 2)
    quarter = cumulated(steps, lambda requests, _: requests / 4)
    if objective == "Availability":
        refused = cumulated(steps, lambda requests, bad: (requests - bad) / 2)
        name = "llm_requests_total"
        return {
            f'{name}{{route="/generate",status="200"}}': refused,
            f'{name}{{route="/generate",status="429"}}': refused,
            f'{name}{{route="/generate",status="503"}}': bad_ones,
            f'{name}{{route="/readyz",status="503"}}': half,
        }
    name = (
        "llm_time_to_first_token_seconds"
        if objective == "TimeToFirstToken"
        else "llm_gateway_overhead_seconds"
    )
    label = 'model="small"' if objective == "TimeToFirstToken" else 'cache="hit"'
    found = {
        f"{name}_count{{{label}}}": everything,
        f'{name}_bucket{{{label},le="0.5"}}': good,
        f'{name}_bucket{{{label},le="0.6"}}': everything,
    }
    if objective == "CacheHit":
        found |= {f'{name}_count{{cache="miss"}}': half, f'{name}_bucket{{cache="miss",le="0.5"}}': quarter}
    return found


def not_of(objective: str) -> str:
    """A series of the same metric that is not the objective's."""
    return {
        "CacheHit": 'llm_gateway_overhead_seconds_count{cache="miss"}',
        "Availability": 'llm_requests_total{route="/livez",status="200"}',
    }.get(objective, "up")


def burns(budget: float, kind: str) -> Iterator[tuple[Steps, float, float, bool]]:
    """Traffic, minutes a step, the minute to look at, and whether the alert fires: at the threshold a share of 1 is bad."""
    factor, long, short = BURNS[kind]
    step, threshold = short / 6, factor * budget
    before, span, brief = long / 5 / step, long / step, short / step

    def steady(requests_in_window: float, share: float) -> Steps:
        requests = requests_in_window / span
        return [(before + span, requests, requests * share * threshold)]

    def turning(first: float, then: float, steps: float) -> Steps:
        return [(before + span - steps, 100, 100 * first * threshold), (steps, 100, 100 * then * threshold)]

    minute = step * (before + span)
    for steps, fires in (
        (steady(100000, 1.5), True),
        (steady(100000, 0.75), False),
        (turning(2.5, 0.75, brief), False),  # it is ending
        (turning(0.5, 3, brief), False),  # it has just begun
        (steady(30, 3), True),
        (steady(15, 3), False),  # too few to tell
    ):
        yield steps, step, minute, fires


def cases_of_objective(objective: dict[str, Any], kind: str) -> Iterator[tuple[Series, float, float, bool]]:
    name = objective["name"]
    if kind in BURNS:
        for steps, step, minute, fires in burns(1 - objective["objective"], kind):
            yield series_of(name, steps), step, minute, fires
    elif kind == "FewRequests":
        for requests, bad, fires in ((15, 8, True), (15, 4, False), (30, 8, False)):
            yield series_of(name, [(72, requests / 72, bad / 72)]), 5, 360, fires
        # Six hours ago.
        yield series_of(name, [(72, 15 / 72, 8 / 72), (144, 0, 0)]), 5, 900, False
    else:
        yield {not_of(name): "1x20"}, 1, 15, True
        yield {not_of(name): "1x20"}, 1, 5, False
        yield series_of(name, [(20, 1, 0)]), 1, 15, False


def for_ever(values: str) -> str:
    """Samples in promtool's notation; `cycle 1 0` is 1 and 0 in turn."""
    return " ".join(values.removeprefix("cycle ").split() * 70) if values.startswith("cycle ") else values


def variant(name: str, number: int) -> str:
    return f"{name}__{number}" if number else name


def alert_tests() -> Iterator[RuleTest]:
    by_objective = {
        f"{objective['name']}{kind}": (objective, kind)
        for objective in SLO["objectives"]
        for kind in (*BURNS, "FewRequests", "WithoutData")
    }
    for rule in (rule for rule in EVERY if "alert" in rule):
        name, found = rule["alert"], []
        if name in by_objective:
            found = list(cases_of_objective(*by_objective[name]))
        for case in CASES.get(name, []):
            for fires in (True, False):
                found += [
                    (case["series"], case.get("step", 1), minute, fires)
                    for minute in case.get("fires" if fires else "quiet", [])
                ]
        variants = [rule["expr"], *mutants(rule["expr"])]
        cases = []
        for series, step, minute, fires in found:
            case = Case(series, step)
            for number in range(len(variants) + ("for" in rule)):
                expr = f'sgn(count(ALERTS{{alertname="{variant(name, number)}",alertstate="firing"}}))'
                case.found.append((expr, minute, 1 if fires else None))
            cases.append(case)
        read = re.findall(r"(?:slo|instance):[\w:]+", rule["expr"])
        objective = by_objective[name][0]["name"] if name in by_objective else ""
        yield RuleTest(rule, variants, cases, [RECORDS[record, objective] for record in dict.fromkeys(read)])


def record_tests() -> Iterator[RuleTest]:
    for (name, objective), rule in RECORDS.items():
        variants = [rule["expr"], *mutants(rule["expr"])]
        if objective:
            number, unit = re.search(r"(\d+)([mhd])$", name).groups()  # type: ignore[union-attr]
            window = int(number) * MINUTES[unit]
            case = Case(series_of(objective, [(40, 50, 5), (10, 100, 20)]), window / 10)
            minute, value = window * 5, {"ratio_rate": 0.2, "all:increase": 1000, "bad:increase": 200}
            expected = next(value[key] for key in value if key in name)
        else:
            case = Case(
                {'llm_requests_waiting{gateway="1"}': "3x5", 'llm_requests_waiting{gateway="2"}': "1x5"}, 1
            )
            minute, expected = 5, 1
        for number in range(len(variants)):
            case.found.append((f"round(sum({variant(name, number)}), 0.001)", minute, expected))
        yield RuleTest(rule, variants, [case])


def written(test: RuleTest, folder: Path) -> Path:
    """The rules file with all variants, and the test file that promtool reads."""
    kind = "alert" if "alert" in test.rule else "record"
    plain = {key: value for key, value in test.rule.items() if key not in ("annotations",)}
    rules = [
        plain | {kind: variant(test.rule[kind], number), "expr": expr}
        for number, expr in enumerate(test.variants)
    ]
    if "for" in test.rule:  # a mutant, too: without patience
        hasty = {key: value for key, value in rules[0].items() if key != "for"}
        rules.append(hasty | {kind: variant(test.rule[kind], len(rules))})
    (folder / f"{test.name}.rules").write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": test.needs + rules}]})
    )
    tests = [
        {
            "interval": f"{round(case.step * 60)}s",
            "input_series": [
                {"series": name, "values": for_ever(values)} for name, values in case.series.items()
            ],
            "promql_expr_test": [
                {
                    "expr": expr,
                    "eval_time": f"{round(minute * 60)}s",
                    "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
                }
                for expr, minute, value in case.found
            ],
        }
        for case in test.cases
    ]
    path = folder / f"{test.name}.test"
    # Without `for`, a rule need be evaluated only when it is looked at.
    moments = {round(minute * 60) for case in test.cases for _, minute, _ in case.found}
    steps = {round(case.step * 60) for case in test.cases}
    interval = f"{min(steps) if 'for' in test.rule else math.gcd(*moments)}s"
    path.write_text(
        yaml.safe_dump(
            {"rule_files": [f"{test.name}.rules"], "evaluation_interval": interval, "tests": tests},
            sort_keys=False,
        )
    )
    return path


TESTS = [*alert_tests(), *record_tests()]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[int]]:
    """By test: the variants that failed a case; 0 is the rule itself."""
    if shutil.which("promtool") is None:
        pytest.fail("promtool is not installed: `make env` installs the packages of requirements.apt")
    folder = tmp_path_factory.mktemp("rules")
    paths = [written(test, folder) for test in TESTS]
    done = subprocess.run(
        ["promtool", "test", "rules", *map(str, paths)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    by_test: dict[str, set[int]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("Unit Testing:"):
            now = by_test.setdefault(Path(line.split()[-1]).stem, set())
        elif told := re.search(
            r'expr: "(?:sgn|round)\((?:count|sum)\((?:ALERTS\{alertname=\\?")?[\w:]+?(?:__(\d+))?[\\")]', line
        ):
            now.add(int(told[1] or 0))
        else:
            assert re.fullmatch(r"\s*|  FAILED:|  SUCCESS|\s+(exp|got): ?.*|\s+got:.*", line), done.stdout
    return by_test


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_a_rule_fires_when_it_should_and_each_mutant_of_it_fails_a_case(
    test: RuleTest, failed: dict[str, set[int]]
) -> None:
    values = [value for case in test.cases for _, _, value in case.found]
    assert None not in values or any(values), "no case fires"
    if "alert" in test.rule:
        assert {None, 1} <= set(values), (
            f"{test.name} needs a case that fires and one that does not, in alert_cases.yml"
        )
    assert 0 not in failed[test.name], f"{test.name} does not do what its cases say"
    known = [*test.variants, "without its `for`"]
    survivors = [
        known[number] for number in range(1, len(case_numbers(test))) if number not in failed[test.name]
    ]
    assert not survivors, f"no case of {test.name} fails with: " + " | ".join(survivors)


def test_mutants_are_what_an_expression_says_with_one_thing_changed() -> None:
    assert list(mutants('a{x="1"} > 0.1\nand\nb[10m] == 0')) == [
        "\nb[10m] == 0",
        'a{x="1"} > 0.1\n',
        "a{} > 0.1\nand\nb[10m] == 0",
        'a{x="1"} <= 0.1\nand\nb[10m] == 0',
        'a{x="1"} > 0.2\nand\nb[10m] == 0',
        'a{x="1"} > 0.05\nand\nb[10m] == 0',
        'a{x="1"} > 0.1\nand\nb[40m] == 0',
        'a{x="1"} > 0.1\nand\nb[10m] != 0',
        'a{x="1"} > 0.1\nand\nb[10m] == 1000000',
    ]


def test_a_mutant_that_no_case_tells_apart_passes_promtool(tmp_path: Path) -> None:
    expr = 'sgn(count(ALERTS{alertname="Weak__1",alertstate="firing"}))'
    case = Case({"a": "9x5"}, 1, [(expr, 3, 1)])
    weak = RuleTest({"alert": "Weak", "expr": "a > 1"}, ["a > 1", "a > 2"], [case])
    path = written(weak, tmp_path)
    assert (
        subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, check=False).returncode
        == 0
    )


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(RULES))
    command = ["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_takes_a_percentile_from_a_guess_within_a_bucket() -> None:
    assert not [rule for rule in EVERY if "histogram_quantile" in rule["expr"]]


def test_each_alert_links_to_a_runbook_that_is_there() -> None:
    page = (ROOT / "docs/operate/metrics.md").read_text()
    headings = set(re.findall(r"^### ([a-z-]+)$", page, re.MULTILINE))
    linked = {rule["annotations"]["runbook_url"].partition("#")[2] for rule in EVERY if "alert" in rule}
    assert linked == headings


def case_numbers(test: RuleTest) -> range:
    """Numbers of a test's variants, the rule itself included."""
    return range(len(test.variants) + ("for" in test.rule))
