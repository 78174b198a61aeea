"""The verdict: statistics that do not promote by chance, on synthetic scores."""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from llmtrain.gate import verdict
from llmtrain.gate.verdict import Pace, Paired, Rule

QUICK = Rule(resamples=1000)
Draw = Callable[[numpy.random.Generator], list[Paired]]
NO_PACE: dict[str, Any] = {}


def answers(random: numpy.random.Generator, rows: int, old: float, new: float, alike: float) -> list[Paired]:
    """Scores of two models with these accuracies, which agree on this share of the rows."""
    luck = random.random(rows)
    own = numpy.where(random.random(rows) < alike, luck, random.random(rows))
    before, after = (luck < old).astype(float), (own < new).astype(float)
    partly = random.random(rows) * 0.5
    return [
        Paired("exact", before, after, 0.02),
        Paired("f1", numpy.maximum(before, partly), numpy.maximum(after, partly), 0.02),
    ]


def texts(random: numpy.random.Generator, rows: int, times: float) -> list[Paired]:
    """Documents for which NEW needs this multiple of OLD's bits, with noise in both."""
    sizes = random.integers(200, 4000, rows).astype(float)
    bits = 4 * sizes * random.gamma(40, 1 / 40, rows)
    noise = random.normal(1, 0.03, (2, rows))
    return [
        Paired("bits_per_byte", bits * noise[0], bits * noise[1] * times, 0.01, sizes, lower_is_better=True)
    ]


def verdicts(draw: Draw, times: int, rule: Rule = QUICK) -> Counter[str]:
    """Verdicts of this many independently drawn sets."""
    return Counter(
        verdict.judge(draw(numpy.random.default_rng(seed)), NO_PACE, rule, same=False)[0]
        for seed in range(times)
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: answers(random, 240, 0.6, 0.6, alike=0.0),
        lambda random: answers(random, 240, 0.6, 0.6, alike=0.97),
        lambda random: answers(random, 400, 0.05, 0.05, alike=0.9),
        lambda random: texts(random, 40, 1.0),
        lambda random: answers(random, 300, 0.5, 0.5, alike=0.5) + texts(random, 60, 1.0),
    ],
    ids=["nothing alike", "few rows differ", "both mostly wrong", "texts", "all metrics"],
)
def test_of_two_equal_models_at_most_one_in_twenty_is_promoted(draw: Draw) -> None:
    assert verdicts(draw, 300)["promote"] <= 15


def test_of_two_models_that_differ_in_few_rows_none_is_promoted_by_those_alone() -> None:
    """Five wins and no loss: the bootstrap's interval is above 0, but chance does the same once in 32 times."""
    before, after = numpy.zeros(240), numpy.zeros(240)
    after[:5] = 1
    found = verdict.measure(Paired("exact", before, after, 0.02), QUICK, tail=0.0125)
    assert found.interval[0] > 0
    assert found.finding == "not worse"


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: answers(random, 600, 0.6, 0.5, alike=0.9),
        lambda random: texts(random, 60, 1.05),
        lambda random: answers(random, 600, 0.6, 0.8, alike=0.9) + texts(random, 60, 1.05),
    ],
    ids=["answers", "texts", "better answers, worse texts"],
)
def test_a_planted_regression_is_rejected(draw: Draw) -> None:
    assert verdicts(draw, 60)["reject"] >= 57


def test_a_loss_that_is_certain_and_within_its_margin_is_no_reason_to_reject() -> None:
    before, after = numpy.zeros(8000), numpy.zeros(8000)
    before[:4000], after[:3960] = 1, 1
    found = verdict.measure(Paired("exact", before, after, 0.02), QUICK, tail=0.025)
    assert found.interval[1] < 0
    assert found.finding == "not worse"


def test_a_loss_that_is_certain_and_perhaps_within_its_margin_is_unclear() -> None:
    before, after = numpy.ones(600), numpy.ones(600)
    after[:15] = 0
    found = verdict.measure(Paired("exact", before, after, 0.02), QUICK, tail=0.025)
    assert found.interval[0] < -0.02 < found.interval[1] < 0
    assert found.finding == "unclear"


def test_a_planted_improvement_is_promoted() -> None:
    assert verdicts(lambda random: answers(random, 600, 0.6, 0.7, alike=0.9), 60)["promote"] >= 57


def test_a_gain_is_no_reason_where_it_is_not_clear_that_nothing_is_worse() -> None:
    random = numpy.random.default_rng(0)
    better = answers(random, 600, 0.6, 0.8, alike=0.9)
    unclear = texts(random, 30, 1.008)
    said, reasons, found = verdict.judge([*better, *unclear], NO_PACE, QUICK, same=False)
    assert found["bits_per_byte"]["finding"] == "unclear"
    assert found["bits_per_byte"]["margin"] == pytest.approx(0.01 * found["bits_per_byte"]["old"])
    assert found["bits_per_byte"]["old"] == pytest.approx(4, rel=0.2)
    assert (said, reasons[0]) == ("hold", "this set does not show whether NEW is worse by bits_per_byte")
    assert f"about {found['bits_per_byte']['rows_to_tell']} rows would suffice" in reasons[-1]


def test_so_many_rows_as_it_asks_for_do_tell() -> None:
    random = numpy.random.default_rng(1)
    few = answers(random, 150, 0.6, 0.6, alike=0.9)[0]
    found = verdict.measure(few, QUICK, tail=0.025)
    assert found.finding == "unclear"
    assert found.rows_to_tell is not None
    times = math.ceil(2 * found.rows_to_tell / 150)
    more = Paired("exact", numpy.tile(few.old, times), numpy.tile(few.new, times), 0.02)
    assert verdict.measure(more, QUICK, tail=0.025).finding != "unclear"


def test_a_model_that_gives_no_numbers_is_rejected() -> None:
    good = texts(numpy.random.default_rng(0), 40, 0.9)[0]
    after = good.new.copy()
    after[7] = math.nan
    said, reasons, found = verdict.judge(
        [Paired("bits_per_byte", good.old, after, 0.01, good.weights, lower_is_better=True)],
        NO_PACE,
        QUICK,
        same=False,
    )
    assert (said, reasons[1]) == ("reject", "bits_per_byte: NEW's scores are NaN")
    json.dumps(found, allow_nan=False)


def test_the_same_bytes_are_never_promoted() -> None:
    better = answers(numpy.random.default_rng(0), 600, 0.2, 0.8, alike=0.9)
    assert verdict.judge(better, NO_PACE, QUICK, same=True)[0] == "hold"


def test_a_margin_of_null_is_told_and_not_judged() -> None:
    worse = answers(numpy.random.default_rng(0), 600, 0.8, 0.2, alike=0.9)
    pairs = [Paired(each.name, each.old, each.new, None) for each in worse]
    said, reasons, _ = verdict.judge(pairs, NO_PACE, QUICK, same=False)
    assert said == "hold"
    assert reasons[1].endswith(": not judged")


@pytest.mark.parametrize(("times", "finding"), [(1.0, "not worse"), (2.0, "worse"), (1.25, "unclear")])
def test_latency_is_judged_by_the_same_prompts_in_turn(times: float, finding: str) -> None:
    random = numpy.random.default_rng(1)
    rounds = random.normal(1, 0.05, (2, 8, 4))
    pace = Pace(rounds[0], rounds[1] * times, 32).as_json(QUICK)
    assert pace["finding"] == finding
    assert pace["ratio"] == pytest.approx(times, rel=0.1)
    assert pace["old"]["tokens_per_second"] == pytest.approx(32, rel=0.1)


def test_a_model_that_is_certainly_too_slow_is_rejected_and_the_rule_may_allow_it() -> None:
    better = answers(numpy.random.default_rng(0), 600, 0.5, 0.8, alike=0.9)
    pace = Pace(numpy.ones((8, 4)), numpy.full((8, 4), 3.0), 32)
    assert verdict.judge(better, pace.as_json(QUICK), QUICK, same=False)[0] == "reject"
    patient = QUICK.model_copy(update={"speed": verdict.Speed(slower=None)})
    assert verdict.judge(better, pace.as_json(patient), patient, same=False)[0] == "promote"


@pytest.mark.parametrize(
    ("rows", "needed"),
    [
        ({"exact": 216, "f1": 216}, 217),
        ({"exact": 5000, "f1": 5000, "bits_per_byte": 29}, 30),
        ({"choice": 29}, 30),
    ],
)
def test_a_set_that_is_too_small_is_told_how_many_rows_it_needs(rows: dict[str, int], needed: int) -> None:
    assert f"at least {needed} are needed" in verdict.too_small(Rule(), rows)
    assert verdict.too_small(Rule(), {name: max(count, needed) for name, count in rows.items()}) == ""
