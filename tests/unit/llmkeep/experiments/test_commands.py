"""`llmkeep experiment`: what it refuses, with which arithmetic, and what it says of outcomes."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import policies
import pytest
import yaml
from declared_experiment import EXPERIMENT

from llmkeep import durable
from llmkeep.cli import main
from llmkeep.experiments import ladder
from llmkeep.policy import source as policy_source
from llmkeep.record import runs

EXPECTS = EXPERIMENT["expects"]
THUMB, CORRECTED = EXPERIMENT["metrics"]


def written(folder: Path, name: str = "one", **changed: Any) -> str:
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(EXPERIMENT | changed))
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
        ({"metrics": [THUMB]}, "define exactly two"),
        ({"metrics": [THUMB] * 2}, "both metrics are 'thumb'"),
        ({"metrics": [THUMB, CORRECTED | {"better": "more"}]}, "better of corrected is 'more'"),
        ({"metrics": [THUMB, CORRECTED | {"difference": float("nan")}]}, "difference of corrected is nan"),
        ({"metrics": [THUMB, CORRECTED | {"difference": float("inf")}]}, "difference of corrected is inf"),
        ({"metrics": [THUMB, CORRECTED | {"name": ["a"]}]}, "a metric's name is ['a']"),
        ({"expects": EXPECTS | {"ratings": float("inf")}}, "ratings is inf"),
        ({"expects": EXPECTS | {"alike": 2}}, "alike is 2"),
        ({"expects": EXPECTS | {"ratings": 0}}, "ratings is 0"),
        ({"expects": None}, "expects is None: write subjects"),
        ({"weight": 3}, "the file has 'weight', which is unknown"),
        ({"guardrails": {"errors": 0.1}}, "guardrails has 'errors', which is unknown: use one of slow_seconds"),
        ({"guardrails": {"failed": 0}}, "failed is 0: write a share of answers"),
        ({"guardrails": {"slow": 0.7}}, "slow is 0.7"),
        ({"guardrails": {"slow_seconds": 301}}, "slow_seconds is 301: write seconds to the first byte"),
        ({"guardrails": {"length": "1"}}, "length is '1'"),
        ({"guardrails": {"refusals": ["I"]}}, "refusals is ['I']"),
        ({"guardrails": [1]}, "guardrails is [1]: write slow_seconds"),
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


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy's own source on a control node that keeps a record."""
    folder = tmp_path / "source"
    shutil.copytree(policies.SOURCE, folder)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "record")
    monkeypatch.setattr(runs, "SEALED_SEED", tmp_path / "seed")
    monkeypatch.setattr(runs, "unseal", lambda sealed, _name: sealed)
    (tmp_path / "seed").write_text("5e" * 32)
    (tmp_path / "record").mkdir(mode=0o700)
    return folder


def entry_of(policy: Path) -> dict[str, Any]:
    found: dict[str, Any] = policy_source.read(policy).data["llm/experiments"]["support-12"]
    return found


def on_record(policy: Path) -> list[dict[str, Any]]:
    paths = sorted((policy.parent / "record").glob("records-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def acted(policy: Path, verb: str, *options: str, **changed: Any) -> int:
    what = "support-12" if verb == "stop" else written(policy.parent, **changed)
    return main(["experiment", verb, what, "--source", str(policy), *options])


WHY = ["--reason", "release 8"]


def test_an_experiment_starts_at_its_first_step_with_all_that_a_host_needs_and_is_on_record(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comments = (policy / "llm/experiments/data.yaml").read_text().removesuffix("{}\n")
    assert acted(policy, "start", *WHY, guardrails={"failed": 0.03}) == 0
    said = capsys.readouterr().out
    assert "support-12: start at 5 %, on record" in said
    assert "next: llmkeep policy build, then llmkeep site" in said
    entry = entry_of(policy)
    assert (entry["percent"], entry["metrics"]) == (5, {"thumb": "higher", "corrected": "lower"})
    assert (entry["guardrails"]["failed"], entry["guardrails"]["refused"]) == (0.03, 0.02)
    assert entry["changed"] | {"at": "", "by": ""} == {
        "by": "",
        "at": "",
        "what": "start at 5 %",
        "reason": "release 8",
    }
    assert policy_source.problems(policy_source.read(policy)) == []
    assert (policy / "llm/experiments/data.yaml").read_text().startswith(comments)
    [event] = on_record(policy)
    assert [event[f"{name}"] for name in ("event.action", "event.reason", "llmkeep.experiment.percent")] == [
        "experiment start support-12",
        "release 8",
        5,
    ]
    assert acted(policy, "start", *WHY) == 1
    assert "support-12 is already running at 5 %: step or stop it" in capsys.readouterr().err


def test_an_experiment_may_start_in_the_shadow_and_then_at_its_first_step(policy: Path) -> None:
    assert acted(policy, "start", "--shadow", "10", *WHY) == 0
    shadow = entry_of(policy)
    assert (shadow["percent"], shadow["shadow"]) == (0, 10)
    assert acted(policy, "step", "--despite", "so") == 1, "copies are no outcomes"
    assert acted(policy, "start", *WHY) == 0
    assert (entry_of(policy)["percent"], entry_of(policy)["shadow"]) == (5, 0)
    assert acted(policy, "stop", *WHY) == 0
    assert acted(policy, "start", "--shadow", "101", *WHY) == 1, "the policy would be invalid"


def outcomes_in(policy: Path, likes: float, percent: int, candidates: int = 1000) -> list[str]:
    """Outcomes in a file, whose shares are those of the step."""
    control = round(candidates * (100 - percent) / percent)
    path = policy.parent / "outcomes.jsonl"
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in outcomes(likes, candidates, percent, control))
    )
    return ["--outcomes", str(path)]


def test_a_step_keeps_the_salt_and_is_the_next_one_alone(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acted(policy, "start", *WHY)
    salt = entry_of(policy)["salt"]
    for before, after in ((5, 25), (25, 50)):
        assert acted(policy, "step", *WHY, *outcomes_in(policy, 0.6, before, 200)) == 0
        assert (entry_of(policy)["percent"], entry_of(policy)["salt"]) == (after, salt)
    capsys.readouterr()
    assert acted(policy, "step", *WHY, *outcomes_in(policy, 0.6, 50)) == 1
    assert "at 50 %, its last step with a control group" in capsys.readouterr().err
    assert [event["event.action"] for event in on_record(policy)] == [
        "experiment start support-12", "experiment step support-12", "experiment step support-12"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("likes", "percent", "candidates", "told"),
    [
        (0.6, 5, 40, "thumb of the candidate has 40 subjects that rate at 5 %, but minimum is 50"),
        (0.4, 5, 400, "thumb is worse at 5 %"),
        (0.6, 25, 400, "there is no outcome at 5 %, the experiment's present step"),
    ],
)
def test_a_step_that_outcomes_speak_against_needs_a_reason_which_is_on_record(
    likes: float, percent: int, candidates: int, told: str, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acted(policy, "start", *WHY)
    seen = outcomes_in(policy, likes, percent, candidates)
    assert acted(policy, "step", *WHY, *seen) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "--despite REASON" in said
    assert entry_of(policy)["percent"] == 5
    assert acted(policy, "step", "--despite", "the board", *seen) == 0
    assert entry_of(policy)["percent"] == 25
    event = on_record(policy)[-1]
    assert event["event.reason"] == "the board"
    assert any(told in each for each in event["llmkeep.experiment.despite"])


@pytest.mark.parametrize(
    "changed",
    [
        {"metrics": [THUMB | {"better": "lower"}, CORRECTED]},
        {"metrics": [THUMB, CORRECTED | {"name": "stars"}]},
        {"minimum": 30},
        {"guardrails": {"failed": 0.03}},
    ],
)
def test_what_judges_an_experiment_is_not_exchanged_once_it_runs(
    changed: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acted(policy, "start", *WHY)
    [name] = changed
    for verb in ("step", "promote"):
        assert acted(policy, verb, "--despite", "so", **changed) == 1
        assert f"{name} of support-12 differs from the policy" in capsys.readouterr().err


def test_only_a_candidate_that_is_better_is_promoted(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acted(policy, "start", *WHY)
    assert acted(policy, "promote", *WHY, *outcomes_in(policy, 0.6, 5, 100)) == 1
    assert "no metric is better at 5 %" in capsys.readouterr().err
    assert acted(policy, "promote", *WHY, *outcomes_in(policy, 0.85, 5, 300)) == 0
    assert entry_of(policy)["percent"] == 100
    said = capsys.readouterr().out
    assert "to llm_serving_models of each serving host, in place of an entry support, add" in said
    assert "{name: support, …}, the rest as its entry support-8 has it" in said
    assert acted(policy, "promote", "--despite", "again") == 1


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"name": "support-8", "driver": "naive", "release": "r8"}, "  - {name: support, driver: naive, release: r8}"),
        ({"name": "base", "driver": "naive", "adapters": {"support-8": "s8"}}, "  support: s8, in the adapters of base"),
        ({"name": "support-8", "driver": "remote"}, "  - {name: support, driver: remote}  # its servers must also have it as"),
        ({"name": "base", "driver": "naive"}, "  nothing yet: there is no support-8"),
    ],
    ids=["model", "adapter", "remote", "absent"],
)  # fmt: skip
def test_a_promoted_candidate_is_given_the_name_as_it_is_served(known: dict[str, Any], told: str) -> None:
    assert ladder.served_as("support", "support-8", [known]).startswith(told)


def test_stop_gives_all_units_the_control_and_a_new_start_another_salt(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acted(policy, "start", *WHY)
    before = entry_of(policy)
    assert acted(policy, "stop", "--reason", "harm") == 0
    after = entry_of(policy)
    assert (after["percent"], after["salt"], after["changed"]["what"]) == (0, before["salt"], "stop at 5 %")
    assert acted(policy, "step", "--despite", "so") == 1
    assert "is not running in this policy" in capsys.readouterr().err
    assert acted(policy, "start", *WHY) == 0
    assert entry_of(policy)["salt"] != before["salt"]
    assert acted(policy, "stop", "--remove", *WHY) == 0
    assert policy_source.read(policy).data["llm/experiments"] == {}
    assert acted(policy, "stop", *WHY) == 1
    assert "policy has no experiment 'support-12': it has none" in capsys.readouterr().err


def test_what_changed_meanwhile_is_not_undone(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    acted(policy, "start", *WHY)
    with durable.alone(policy):
        assert acted(policy, "stop", *WHY) == 1
    assert "another llmkeep is using" in capsys.readouterr().err
    path = policy / "llm/experiments/data.yaml"
    by_hand = path.read_text().replace("percent: 5\n", "percent: 0\n")
    against = ladder.against

    def meanwhile(*given: Any, **named: Any) -> list[str]:
        path.write_text(by_hand)
        return against(*given, **named)

    monkeypatch.setattr(ladder, "against", meanwhile)
    assert acted(policy, "step", "--despite", "so") == 1
    assert "was changed by another process; nothing was changed: try again" in capsys.readouterr().err
    assert path.read_text() == by_hand


def test_nothing_is_changed_that_is_not_on_record_or_that_policy_or_gateways_would_not_take(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = policy / "llm/experiments/data.yaml"
    before = path.read_text()
    assert acted(policy, "start", *WHY, unit="conversation") == 1
    assert "which no request names: use one of subject or request" in capsys.readouterr().err
    monkeypatch.setattr(runs, "FOLDER", path / "record")
    assert acted(policy, "start", *WHY) == 1
    assert "the audit record" in capsys.readouterr().err
    assert path.read_text() == before
    monkeypatch.setattr(runs, "FOLDER", policy.parent / "record")
    acted(policy, "start", *WHY)
    other = {"experiment": "support-13"}
    assert acted(policy, "start", *WHY, **other) == 1
    assert "the policy would be invalid; nothing was changed" in capsys.readouterr().err
    assert acted(policy, "step", "--despite", "so", candidate="support-9") == 1
    assert "candidate of support-12 differs from the policy" in capsys.readouterr().err


def test_without_a_source_of_its_own_a_verb_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acted(tmp_path / "none", "start", *WHY) == 1
    assert "exist: create the estate's own source with `cp -r " in capsys.readouterr().err


def outcomes(
    likes: float, candidates: int = 1000, percent: int = 50, controls: int = 1000
) -> list[dict[str, Any]]:
    """A thousand subjects of the control, or as many as said, who like 60 % of their four answers each, and as many of the
    candidate as said."""
    chance = random.Random(3)  # noqa: S311 - a simulation
    found = []
    for arm, subjects, share in (("control", controls, 0.6), ("candidate", candidates, likes)):
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


def test_one_client_decides_no_experiment_by_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """120 ratings of one subject, which sees which arm answered, beside those of 200 raters who see no difference."""
    found = []
    for number in range(320):
        arm = ("control", "candidate")[number % 2]
        honest = number < 200
        rater, value = (f"s{number}", number // 2 % 2) if honest else ("one client", arm == "candidate")
        found.append(
            {
                "unit": f"r{number}",
                "rater": rater,
                "arm": arm,
                "percent": 50,
                "metric": "thumb",
                "value": int(value),
            }
        )
    assert shown(tmp_path, found) == 0
    said = capsys.readouterr().out
    assert "0.455 (110), 0.545 (110)" in said, "ten of each arm count"
    assert "undecided; one subject has 9% of an arm's at most" in said


def test_nothing_is_concluded_where_one_subject_has_too_large_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[dict[str, Any]] = []
    for arm, value in (("control", 0), ("candidate", 1)):
        for number in range(60):
            found.append(
                {"unit": f"{arm}-{number}", "arm": arm, "percent": 50, "metric": "thumb", "value": value}
            )
        found += [found[-1]] * 9
    assert shown(tmp_path, found) == 0
    thumb = capsys.readouterr().out.splitlines()[1]
    low = float(thumb.split("; ")[1].split(" to ")[0])
    assert low > 0, "it would be better"
    assert thumb.endswith("undecided; one subject has 14% of an arm's at most")


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
