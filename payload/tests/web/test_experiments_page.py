"""The product owner's page: what the policy has, what `llmkeep experiment show` found, and what this host's journal says."""

import argparse
import asyncio
import json
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from authority import experiment_commands
from markupsafe import escape
from operator_page import OperatorPage
from watched_estate import HOSTILE

from llmcore.experiments import identifier
from llmcore.ratings import ARM_FIELD, ASSIGNED, FIELD, RATED
from llmserve.access.experiments import Experiment, Unit
from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange, Receive, Scope, Send
from llmserve.feedback.journal import append
from llmserve.gateway.middleware import ErrorEnvelope
from llmserve.metrics import Metrics
from llmweb import experiments
from llmweb.experiments import shown
from llmweb.monitors import Reading, Series
from llmweb.sections import Look, Plot

URL = "/operator/experiments"
RUN = identifier("support-12", "0123456789abcdef")
DEFINITION = {
    "experiment": "support-12",
    "model": "support",
    "control": "deepseek-chat",
    "candidate": "embed-small",
    "unit": "subject",
    "tenants": ["research"],
    "ladder": [5, 50],
    "days": 14,
    "minimum": 30,
    "metrics": [
        {"name": "thumb", "better": "higher", "difference": 0.1},
        {"name": "corrected", "better": "lower", "difference": 0.05},
    ],
    "expects": {"subjects": 2000, "conversations": 900, "requests": 6000, "ratings": 400, "alike": 0.2},
}


@pytest.fixture(scope="module")
def owner(page: OperatorPage) -> Iterator[httpx.Client]:
    with page.signed_in(page.key("product_owner", "paula")[0]) as client:
        yield client


@pytest.fixture
def verdict(page: OperatorPage) -> Iterator[Path]:
    path = page.gateway.folder / "verdicts/support-12.json"
    yield path
    path.unlink(missing_ok=True)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", answer.text))


def show(folder: Path, rate: dict[str, float], met: dict[str, int]) -> str:
    """What `llmkeep experiment show --json` prints of these outcomes at 50 %: thumbs up by arm, and how many units."""
    (folder / "experiment.yml").write_text(yaml.safe_dump(DEFINITION))
    lines: list[dict[str, Any]] = [
        {
            "unit": f"{arm}{number}",
            "arm": arm,
            "percent": 50,
            "metric": "thumb",
            "value": float(number < rate[arm] * count),
        }
        for arm, count in met.items()
        for number in range(count)
    ]
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parser = argparse.ArgumentParser()
    experiment_commands.register(parser.add_subparsers())
    given = [
        "experiment",
        "show",
        str(folder / "experiment.yml"),
        "--outcomes",
        str(folder / "outcomes.jsonl"),
        "--json",
    ]
    options = parser.parse_args(given)
    printed = StringIO()
    with redirect_stdout(printed):
        options.run(options)
    return printed.getvalue()


def test_product_owners_alone_see_it(page: OperatorPage) -> None:
    key, identifier = page.key("product_owner", "pia")
    with page.client() as client:
        signed = client.post(
            "/operator/sign-in", data={"key": key}, headers={"sec-fetch-site": "same-origin"}
        )
        assert signed.headers["location"] == URL
        assert client.get(URL).status_code == 200
        assert client.get("/operator/reviews").status_code == 403
    for role in "operator", "developer", "admin", "auditor", "expert":
        with page.client() as other:
            headers = {"authorization": f"Bearer {page.key(role, role)[0]}"}
            assert other.get(URL, headers=headers).status_code == 403, role
    actions = [
        each["event.action"] for each in page.records() if each.get("llmkeep.identity.id") == identifier
    ]
    assert f"GET {URL}" in actions


def test_experiments_of_all_tenants_are_shown_without_their_salt(owner: httpx.Client) -> None:
    answer = owner.get(URL)
    shown = text(answer)
    assert "support-12 support deepseek-chat embed-small subject 5 %" in shown
    assert "0123456789abcdef" not in answer.text


def test_intervals_are_those_of_llmkeep(owner: httpx.Client, verdict: Path, tmp_path: Path) -> None:
    told = show(tmp_path, {"control": 0.3, "candidate": 0.8}, {"control": 400, "candidate": 400})
    verdict.write_text(told)
    low, high = json.loads(told)[0]["metrics"][0]["interval"]
    answer = owner.get(URL)
    shown = text(answer)
    assert (
        f'<desc id="intervals-d">support-12 · 50 % · thumbs up {low:+.3f} … {high:+.3f}</desc>' in answer.text
    )
    [bar] = re.findall(r'class="line s0" d="M([0-9.]+) 32H([0-9.]+)"', answer.text)
    zero, one = 200, 348  # of an axis that ends at 1
    assert [float(end) for end in bar] == pytest.approx(
        [zero + each * (one - zero) for each in (low, high)], abs=0.1
    )
    assert f"support-12 · 50 % · thumbs up 0.300 (400) 0.800 (400) {low:+.3f} … {high:+.3f} better" in shown
    assert "support-12 · 50 % · corrected – – not yet: too few units undecided" in shown


def test_a_verdict_is_as_old_as_its_computation_and_not_as_its_file(
    owner: httpx.Client, verdict: Path, tmp_path: Path
) -> None:
    rungs = json.loads(show(tmp_path, {"control": 0.3, "candidate": 0.8}, {"control": 40, "candidate": 40}))
    assert datetime.now(UTC) - datetime.fromisoformat(rungs[0]["time"]) < timedelta(minutes=1)
    verdict.write_text(json.dumps([rung | {"time": "2026-11-20T08:00:00+00:00"} for rung in rungs]))
    assert "support-12: as of 2026-11-20 08:00:00 UTC" in text(owner.get(URL))
    verdict.write_text(told("[0, 1]"))
    os.utime(verdict, (0, 0))
    assert "support-12: copied on 1970-01-01 00:00:00 UTC" in text(owner.get(URL))


def test_a_verdict_that_is_stopped_says_why(owner: httpx.Client, verdict: Path, tmp_path: Path) -> None:
    verdict.write_text(show(tmp_path, {"control": 0.3, "candidate": 0.3}, {"control": 400, "candidate": 200}))
    assert "400 units 200 units – no verdict: the candidate has 200 of 600 units" in text(owner.get(URL))


def told(interval: str, mean: str = "0.5", units: str = "2") -> str:
    """A file of one rung with one metric, by these parts of JSON."""
    arm = f'{{"mean": {mean}, "values": 1}}'
    metric = f'{{"metric": "thumb", "verdict": "better", "interval": {interval}, "control": {arm}, "candidate": {arm}}}'
    return f'[{{"percent": 5, "units": [1, {units}], "stopped": "", "metrics": [{metric}]}}]'


def test_an_interval_too_narrow_for_a_plot_is_shown(owner: httpx.Client, verdict: Path) -> None:
    verdict.write_text(told("[0, 5e-324]"))
    assert "0.500 (1) 0.500 (1) +0.000 … +0.000 better" in text(owner.get(URL))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "{}",
        "[1]",
        '[{"percent": 5}]',
        "[" * 100_000,
        json.dumps([{"percent": 5, "units": [1, 2], "stopped": "", "metrics": [
            {"metric": HOSTILE, "verdict": "better", "interval": [0, 1], "control": {}, "candidate": {}}]}]),
        told("[0, NaN]"),
        told("[0, Infinity]"),
        told("[0, 1e308]"),
        told("[0, 1]", "NaN"),
        told("[0, 1]", units="1e999"),
        *(told("[0, 1]").replace('"percent"', f'"time": {time}, "percent"')
          for time in ("7", '""', '"now"', '"0001-01-01T00:00:00+14:00"')),
    ],
)  # fmt: skip
def test_a_file_that_is_no_verdict_is_no_data(owner: httpx.Client, verdict: Path, content: str) -> None:
    verdict.write_text(content)
    answer = owner.get(URL)
    if content == "{}":
        assert "There are no outcomes yet" in text(answer)
    else:
        assert "no data: the file is not the output of llmkeep experiment show --json" in text(answer)
    assert "<script" not in answer.text


def test_no_file_is_no_data(owner: httpx.Client) -> None:
    assert "no data: the output of llmkeep experiment show --json was not copied to this host" in text(
        owner.get(URL)
    )


def test_words_of_a_file_are_text(owner: httpx.Client, verdict: Path) -> None:
    verdict.write_text(json.dumps([{"percent": 5, "units": [1, 2], "stopped": HOSTILE, "metrics": []}]))
    answer = owner.get(URL).text
    assert str(escape(HOSTILE)) in answer
    assert "<script" not in answer


def test_a_file_is_found_by_a_name_alone(tmp_path: Path) -> None:
    (tmp_path / "verdicts").mkdir()
    (tmp_path / "other.json").write_text("[]")
    assert shown(tmp_path / "verdicts", "../other") == (None, None)


def test_ratings_of_both_arms_are_those_of_the_present_step(page: OperatorPage, owner: httpx.Client) -> None:
    def met(number: int, arm: str, percent: int = 5, run: str = RUN, **said: object) -> None:
        head = {"@timestamp": "2026-11-27T08:00:00.000+00:00", "transaction.id": f"{number:016x}"}
        about = {"name": "support-12", "id": run, "arm": arm, "percent": percent, "unit": f"u{number}"}
        records = [(ASSIGNED, head | {ARM_FIELD + name: value for name, value in about.items()})]
        if said:
            records.append((RATED, head | {FIELD + name: value for name, value in said.items()}))
        append(page.journal, records)

    met(1000, "candidate", thumb="up")
    met(1001, "candidate", thumb="down", corrected=True)
    met(1002, "candidate")
    met(1003, "control", stars=2)
    met(1004, "control", stars=5)
    met(1005, "candidate", 50, thumb="up")
    met(1006, "candidate", run="with another salt", thumb="up")
    shown = text(owner.get(URL))
    assert "support-12 · deepseek-chat 2 no ratings 3.50 (2) 0 % (2)" in shown
    assert "support-12 · embed-small 3 50 % (2) no ratings 50 % (2)" in shown


def test_times_and_failures_are_of_the_arms_models(owner: httpx.Client) -> None:
    answer = owner.get(URL)
    titles = re.findall(r'<title id="(\w+)-t">', answer.text)
    assert titles == ["arms_first_token", "arms_failed"]
    assert answer.text.count("No line, because there are no values: embed-small.") == 2
    last = re.findall(r"Last values: deepseek-chat ([0-9.]+) (s|%)", answer.text)
    assert [unit for _, unit in last] == ["s", "%"]
    assert 0.5 < float(last[1][0]) < 2, "1 % in this estate"


def test_of_arms_whose_lines_are_left_out_no_one_says_that_they_have_no_values() -> None:
    arms = tuple(
        Experiment(f"e{n}", f"m{n}", f"control{n}", f"candidate{n}", "request", 5, "") for n in range(4)
    )
    values = {
        name: Series({"model": name}, [(0.0, 1.0)])
        for each in arms
        for name in (each.control, each.candidate)
    }

    class Answering:
        async def over(self, *_: object) -> Reading[Series]:
            return Reading(60.0, list(values.values()))

    look = Look(Answering(), "en", arms)  # type: ignore[arg-type]
    plot = asyncio.run(experiments.failures(look, None))  # type: ignore[arg-type]
    assert isinstance(plot, Plot)
    assert plot.notes == [look.say("left_out", count=2)]


@pytest.mark.parametrize(("unit", "counts"), [("subject", (4, True)), ("request", (9, False))])
def test_more_subjects_than_memory_has_room_for_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: Unit, counts: tuple[int, bool]
) -> None:
    monkeypatch.setattr(experiments, "MOST", 4)
    experiment = Experiment("support-12", "support", "one", "two", unit, 5, "salt")
    about = {"id": experiment.id, "arm": "control", "percent": 5}
    lines = [{"transaction.id": f"{number}", ARM_FIELD + "unit": f"{number}"} for number in range(9)]
    named = {ARM_FIELD + name: value for name, value in about.items()}
    append(tmp_path, [(ASSIGNED, line | named) for line in lines])
    arm = experiments.count(tmp_path, experiment).arms["control"]
    assert (arm.units, arm.cut) == counts


def test_of_more_ratings_than_memory_has_room_for_the_newest_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "MOST", 4)
    experiment = Experiment("support-12", "support", "one", "two", "request", 5, "salt")
    about = {"id": experiment.id, "arm": "control", "percent": 5, "unit": "u"}
    for number in range(9):
        head = {"transaction.id": f"{number}"}
        assigned = head | {ARM_FIELD + name: value for name, value in about.items()}
        thumb = head | {FIELD + "thumb": "up" if number > 4 else "down"}
        append(tmp_path, [(ASSIGNED, assigned), (RATED, thumb)])
    found = experiments.count(tmp_path, experiment)
    assert (found.arms["control"].values["thumb"], found.cut) == ((4, 4.0), True)


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise scope["error"]


@pytest.mark.parametrize(
    ("error", "count"),
    [
        (ApiError(503, "engine_unavailable", "x"), 1),
        (RuntimeError("x"), 1),
        (ApiError(429, "too_many_waiting", "x"), 0),
    ],
)
def test_what_fails_for_a_reason_of_ours_is_counted_by_the_arms_model(error: Exception, count: int) -> None:
    metrics = Metrics()
    exchange = Exchange(b"id", b"trace", False, 0.0, model="support-8")

    async def send(_: Any) -> None:
        pass

    asyncio.run(ErrorEnvelope(failing, metrics)({"llm": exchange, "error": error}, None, send))  # type: ignore[arg-type]
    assert (f'llm_failed_total{{model="support-8"}} {count}.0' in metrics.render()[0].decode()) == bool(count)
