"""`llmkeep experiment`: what it refuses, with which arithmetic, and what it says of outcomes."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import policies
import pytest
import yaml

from llmkeep.cli import main
from llmkeep.policy import source as policy_source

GIVEN: dict[str, Any] = {
    "experiment": "support-12",
    "model": "support",
    "control": "support-7",
    "candidate": "support-8",
    "unit": "subject",
    "tenants": ["research"],
    "ladder": [5, 25, 50, 100],
    "days": 14,
    "minimum": 50,
    "metrics": [
        {"name": "thumb", "better": "higher", "difference": 0.1},
        {"name": "corrected", "better": "lower", "difference": 0.02},
    ],
    "expects": {"subjects": 2000, "conversations": 900, "requests": 6000, "ratings": 400, "alike": 0.2},
}
EXPECTS = GIVEN["expects"]
THUMB, CORRECTED = GIVEN["metrics"]


def written(folder: Path, name: str = "one", **changed: Any) -> str:
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(GIVEN | changed))
    return str(path)


def test_an_experiment_says_what_each_rung_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "check", written(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "support is support-7, and for some support-8; a step each 14 days" in said[0]
    assert said[1].startswith(
        "    5 %: candidate 100, control 1900 subjects that rate; finds a difference of 0."
    )
    found = [float(line.split("difference of ")[1].split()[0]) for line in said[1:4]]
    assert found == sorted(found, reverse=True), "equal arms find the most"
    assert "no rung finds 0.02 of corrected" in said[4]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"expects": EXPECTS | {"subjects": 50}}, "at 5 % the candidate has 2 subjects that rate"),
        ({"unit": "request", "expects": EXPECTS | {"ratings": 2}}, "6000 requests a day × 14 days and 2 ratings a day × 14 days"),
        ({"candidate": "support-7"}, "both arms are 'support-7'"),
        ({"candidate": None}, "candidate is None"),
        ({"ladder": [50, 99]}, "at 99 % the control has 20 subjects that rate"),
        ({"ladder": [5, 101]}, "ladder is [5, 101]"),
        ({"ladder": [25, 5]}, "ladder is [25, 5]"),
        ({"ladder": [100]}, "ladder is [100]"),
        ({"ladder": []}, "ladder is []"),
        ({"unit": ["subject"]}, "unit is ['subject']"),
        ({"unit": "click"}, "unit is 'click': take subject, conversation, request"),
        ({"tenants": []}, "tenants is []"),
        ({"minimum": 10}, "minimum is 10: write a whole number of 30 or more"),
        ({"days": 1.5}, "days is 1.5"),
        ({"metrics": [THUMB]}, "fix two in advance"),
        ({"metrics": [THUMB] * 2}, "both metrics are 'thumb'"),
        ({"metrics": [THUMB, CORRECTED | {"better": "more"}]}, "better of corrected is 'more'"),
        ({"metrics": [THUMB, CORRECTED | {"difference": float("nan")}]}, "difference of corrected is nan"),
        ({"metrics": [THUMB, CORRECTED | {"difference": float("inf")}]}, "difference of corrected is inf"),
        ({"metrics": [THUMB, CORRECTED | {"name": ["a"]}]}, "a metric's name is ['a']"),
        ({"expects": EXPECTS | {"ratings": float("inf")}}, "ratings is inf"),
        ({"expects": EXPECTS | {"alike": 2}}, "alike is 2"),
        ({"expects": EXPECTS | {"ratings": 0}}, "ratings is 0"),
        ({"expects": None}, "expects is None: write subjects"),
        ({"weight": 3}, "the file has 'weight', which is not known"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_reason(
    changed: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", "check", written(tmp_path, **changed)]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["- a list", "unit: subject\nunit: request", "\xff", "{", "!!python/name:os.system x"]
)
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "one.yml"
    path.write_bytes(text.encode("latin-1"))
    assert main(["experiment", "check", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_two_experiments_on_one_model_are_refused_where_they_share_a_tenant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = written(tmp_path)
    assert (
        main(
            ["experiment", "check", one, written(tmp_path, "two", experiment="support-13", tenants=["sales"])]
        )
        == 0
    )
    assert main(["experiment", "check", one, written(tmp_path, "two", experiment="support-13")]) == 1
    assert "both ask research about 'support'" in capsys.readouterr().err
    assert main(["experiment", "check", one, written(tmp_path, "two", tenants=["sales"])]) == 1
    assert "two files are the experiment 'support-12'" in capsys.readouterr().err


def test_the_entry_in_policy_is_one_that_policy_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", "policy", written(tmp_path), "--percent", "5"]) == 0
    told = capsys.readouterr()
    entry = yaml.safe_load(told.out)
    salt = entry["support-12"]["salt"]
    assert "by --salt" in told.err
    source = policy_source.read(policies.SOURCE)
    changed = replace(source, data=source.data | {"llm/experiments": entry}, tests={})
    assert policy_source.problems(changed) == []
    assert main(["experiment", "policy", written(tmp_path), "--percent", "25", "--salt", salt]) == 0
    told = capsys.readouterr()
    assert yaml.safe_load(told.out)["support-12"] == entry["support-12"] | {"percent": 25}
    assert told.err == ""


@pytest.mark.parametrize(
    ("options", "changed", "told"),
    [
        (["--percent", "10"], {}, "--percent is 10: support-12 has the steps 5, 25, 50, 100, and 0"),
        (["--percent", "5", "--salt", "short"], {}, "--salt is 'short'"),
        (["--percent", "5"], {"unit": "conversation"}, "which no request names: take subject or request"),
    ],
)
def test_no_entry_is_printed_that_a_gateway_could_not_follow(
    options: list[str], changed: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", "policy", written(tmp_path, **changed), *options]) == 1
    assert told in capsys.readouterr().err


def outcomes(likes: float, candidates: int = 1000, percent: int = 50) -> list[dict[str, Any]]:
    """A thousand subjects of the control, who like 60 % of their four answers each, and as many of the candidate as said."""
    chance = random.Random(3)  # noqa: S311 - a simulation
    found = []
    for arm, subjects, share in (("control", 1000, 0.6), ("candidate", candidates, likes)):
        for number in range(subjects):
            unit = {"unit": f"{arm}-{number}", "arm": arm, "percent": percent}
            found += [unit | {"metric": "thumb", "value": int(chance.random() < share)} for _ in range(4)]
            found.append(unit | {"metric": "corrected", "value": int(chance.random() < 0.1)})
    return found


def shown(folder: Path, lines: list[Any], *options: str) -> int:
    path = folder / "outcomes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return main(["experiment", "show", written(folder), "--outcomes", str(path), *options])


@pytest.mark.parametrize(("likes", "verdict"), [(0.75, "better"), (0.45, "worse"), (0.6, "undecided")])
def test_a_candidate_is_told_better_or_worse_by_its_interval(
    likes: float, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(tmp_path, outcomes(likes), "--json") == 0
    [rung] = json.loads(capsys.readouterr().out)
    thumb, corrected = rung["metrics"]
    assert (thumb["verdict"], corrected["verdict"]) == (verdict, "undecided")
    low, high = thumb["interval"]
    assert low < likes - 0.6 < high


def test_fewer_units_than_the_minimum_have_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(tmp_path, outcomes(0.9, candidates=45, percent=5)) == 0
    assert "no interval yet: undecided" in capsys.readouterr().out


def test_shares_that_are_not_as_declared_stop_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--json"]):
        assert shown(tmp_path, outcomes(0.75, candidates=800), *options) == 3
        said = capsys.readouterr().out
        assert "the candidate has 800 of 1800 units instead of 50 %" in said
        assert "better" not in said


def test_units_that_met_both_arms_stop_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crossed = {"unit": "control-5", "arm": "candidate", "percent": 50}
    assert shown(tmp_path, [*outcomes(0.75), crossed]) == 3
    assert "1 units met both arms" in capsys.readouterr().out


def test_what_is_no_json_is_refused_with_the_number_of_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outcomes.jsonl"
    for line in (b'{"unit": "\xff"}', b"[" * 100_000):
        path.write_bytes(line)
        assert main(["experiment", "show", written(tmp_path), "--outcomes", str(path)]) == 1
        assert "line 1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        {"unit": "a", "arm": "third", "percent": 50},
        {"unit": "a", "arm": "control", "percent": 60},
        {"unit": "a", "arm": "control", "percent": 100},
        {"unit": 7, "arm": "control", "percent": 50},
        {"unit": "a", "arm": "control", "percent": 50, "metric": "stars", "value": 1},
        {"unit": "a", "arm": "control", "percent": 50, "metric": "thumb", "value": 5},
        {"unit": "a", "arm": "control", "percent": 50, "metric": "thumb"},
        {"arm": "control"},
        [],
    ],
)  # fmt: skip
def test_a_line_that_is_no_outcome_is_refused_with_its_number(
    line: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(tmp_path, [{"unit": "a", "arm": "control", "percent": 50}, line]) == 1
    assert "outcomes.jsonl, line 2: " in capsys.readouterr().err
