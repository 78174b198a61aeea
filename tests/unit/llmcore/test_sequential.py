"""Intervals that may be looked at any time, proven on simulated raters whose truth is known."""

import math
import random

import pytest

from llmcore import sequential

ALPHA, LOOKS = 0.01, 20


def arm(
    chance: random.Random, likes: float, subjects: int, each: int, alike: float
) -> list[tuple[int, float]]:
    """Ratings of so many subjects: with probability ALIKE a subject always says the same."""
    found = []
    for _ in range(subjects):
        if chance.random() < alike:
            found.append((each, float(each * (chance.random() < likes))))
        else:
            found.append((each, float(chance.binomialvariate(each, likes))))
    return found


def looked_at(seed: int, difference: float, per_look: int, planned: float, alike: float = 0.2) -> int | None:
    """At which of 20 looks the interval leaves 0; None if at none. A subject rates four times."""
    chance = random.Random(seed)  # noqa: S311 - a simulation
    control: list[tuple[int, float]] = []
    candidate: list[tuple[int, float]] = []
    for look in range(1, LOOKS + 1):
        control += arm(chance, 0.6, per_look, 4, alike)
        candidate += arm(chance, 0.6 + difference, per_look, 4, alike)
        low, high = sequential.difference(control, candidate, planned, ALPHA)
        if low > 0 or high < 0:
            return look
    return None


# At which 5 points are found with 95 % power.
PLANNED = (0.05 / sequential.effect_found(1, 0.95, ALPHA)) ** 2
# So many subjects an arm and look that the last look has the planned variance: a rating's variance is 0.24, of four alike ones
# of a fifth of the subjects 0.24 * (1 + 3 * 0.2) / 4.
PER_LOOK = math.ceil(2 * 0.24 * (1 + 3 * 0.2) / 4 / PLANNED / LOOKS)


def test_equal_arms_are_told_apart_in_at_most_15_of_1000_experiments_of_20_looks() -> None:
    told = sum(looked_at(seed, 0, 30, PLANNED) is not None for seed in range(1000))
    assert told <= 15


def test_a_difference_of_5_points_is_found_with_95_percent_power() -> None:
    found = sum(looked_at(seed, 0.05, PER_LOOK, PLANNED) is not None for seed in range(60))
    assert found >= 57


def test_an_arm_that_is_15_points_worse_is_found_before_a_third_of_what_5_points_need() -> None:
    looks = [looked_at(seed, -0.15, PER_LOOK, PLANNED) for seed in range(20)]
    assert all(look is not None and look <= LOOKS / 3 for look in looks), looks


def test_ratings_of_one_subject_that_are_alike_widen_the_interval() -> None:
    chance = random.Random(7)  # noqa: S311 - a simulation
    clustered = arm(chance, 0.5, 500, 10, 1.0)
    apart = [(1, float(chance.random() < 0.5)) for _ in range(5000)]
    assert sequential.mean(clustered).variance == pytest.approx(0.25 / 500, rel=0.05)
    assert sequential.mean(apart).variance == pytest.approx(0.25 / 5000, rel=0.05)


def test_the_interval_is_narrowest_in_standard_errors_where_it_was_planned_to_be() -> None:
    def errors(variance: float) -> float:
        return sequential.margin(variance, 1e-4, ALPHA) / math.sqrt(variance)

    assert errors(1e-4) < min(errors(1e-3), errors(1e-5))


@pytest.mark.parametrize("few", [0, 1, 29])
def test_of_few_clusters_there_is_no_interval(few: int) -> None:
    many = [(1, 1.0), (1, 0.0)] * 50
    assert sequential.difference([(1, 1.0)] * few, many, 1e-4, ALPHA) == (-math.inf, math.inf)


def test_rare_events_of_equal_arms_are_told_apart_no_more_often() -> None:
    """A twentieth of the units has the candidate, and one of twenty is an event: the first thirty often have none."""
    told = 0
    for seed in range(300):
        chance = random.Random(seed)  # noqa: S311 - a simulation
        events, units = [0, 0], [0, 0]
        for _ in range(LOOKS):
            for arm, more in enumerate((190, 10)):
                units[arm] += more
                events[arm] += chance.binomialvariate(more, 0.05)
            control, candidate = (
                [(1, 1.0)] * events[arm] + [(1, 0.0)] * (units[arm] - events[arm]) for arm in (0, 1)
            )
            low, high = sequential.difference(control, candidate, 3e-4, ALPHA)
            if low > 0 or high < 0:
                told += 1
                break
    assert told <= 4


def test_the_mean_and_its_variance_are_those_of_cluster_robust_regression() -> None:
    """Of statsmodels 0.15.0, OLS on a constant with `cov_type="cluster"`; tea-tasting 2.0.0's RatioOfMeans has the same, too."""
    found = sequential.mean([(3, 2.0), (1, 1.0), (2, 0.0), (4, 3.0)])
    assert [found.mean, found.variance] == pytest.approx([0.6, 0.0266666667])


def test_a_share_that_is_not_as_declared_is_found_and_one_that_is_is_not() -> None:
    assert sequential.mismatch((5_000, 5_000), (0.5, 0.5)) < 1
    assert sequential.mismatch((5_300, 4_700), (0.5, 0.5)) > 1000
    assert sequential.mismatch((9_500, 500), (0.95, 0.05)) < 1
    assert sequential.mismatch((0, 0), (0.5, 0.5)) == 1


def test_shares_as_declared_are_doubted_in_at_most_one_of_1000_experiments_however_often_one_looks() -> None:
    doubted = 0
    for seed in range(1000):
        chance = random.Random(seed)  # noqa: S311 - a simulation
        counts = [0, 0]
        for _ in range(LOOKS):
            more = chance.binomialvariate(50, 0.05)
            counts[0] += 50 - more
            counts[1] += more
            if sequential.mismatch(counts, (0.95, 0.05)) >= 1000:
                doubted += 1
                break
    assert doubted <= 1


def test_sums_that_growing_clusters_leave_and_join_again_are_those_of_the_clusters() -> None:
    sums = sequential.summed([(2, 1.0), (1, 1.0), (2, 0.0), (1, 1.0)])
    for before, grown in (((2, 1.0), (3, 2.0)), ((1, 1.0), (4, 3.0))):
        sums.add(before, -1)
        sums.add(grown)
    found, expected = sums.mean(), sequential.mean([(3, 2.0), (1, 1.0), (2, 0.0), (4, 3.0)])
    assert (found.clusters, found.values) == (expected.clusters, expected.values)
    assert (found.mean, found.variance) == pytest.approx((expected.mean, expected.variance))


def test_of_one_cluster_or_of_values_without_variance_nothing_is_sure() -> None:
    sure = [sequential.mean(clusters) for clusters in ([(1, 1.0)], [(1, 1.0)] * 50)]
    low = sequential.mean([(1, 0.0)] * 50)
    assert [sequential.surely_above(high, low, 1, 0, 1e-3, ALPHA) for high in sure] == [False, False]


def test_a_mean_is_above_another_s_multiple_only_where_the_margin_says_so() -> None:
    chance = random.Random(5)  # noqa: S311 - a simulation
    high, low = (
        sequential.mean([(1, chance.expovariate(1 / size)) for _ in range(4000)]) for size in (200, 100)
    )
    planned = sequential.planned_for(50, ALPHA)
    above = [sequential.surely_above(high, low, times, 0, planned, ALPHA) for times in (1.5, 1.9, 2.1)]
    assert above == [True, False, False]


def with_liars(seed: int, worse: float, favour: str) -> str:
    """The verdict of a candidate that is WORSE, where a tenth of its raters lies: they say the opposite, or rate the worse arm up
    and the other one down, as if they knew. 2,000 subjects in halves, 400 ratings a day, looked at each day for 14 days.
    """
    chance = random.Random(seed)  # noqa: S311 - a simulation
    likes = {"control": 0.6 + worse / 2, "candidate": 0.6 - worse / 2}
    raters: dict[tuple[str, int], tuple[bool | None, float]] = {}
    seen: dict[str, dict[int, tuple[int, float]]] = {"control": {}, "candidate": {}}
    alpha = ALPHA / 6  # three steps, two metrics
    for _ in range(14):
        for _ in range(400):
            arm, subject = chance.choice(["control", "candidate"]), chance.randrange(1000)
            if (arm, subject) not in raters:
                likely = likes[arm]
                if chance.random() < 0.1:
                    likely = 1 - likely if favour == "opposite" else float(arm == "candidate")
                always = chance.random() < 0.2
                raters[arm, subject] = chance.random() < likely if always else None, likely
            habit, likely = raters[arm, subject]
            number, total = seen[arm].get(subject, (0, 0.0))
            said = chance.random() < likely if habit is None else habit
            seen[arm][subject] = number + 1, total + said
        low, high = sequential.difference(
            list(seen["control"].values()),
            list(seen["candidate"].values()),
            sequential.planned_for(0.05, alpha),
            alpha,
        )
        if low > 0 or high < 0:
            return "better" if low > 0 else "worse"
    return "undecided"


@pytest.mark.parametrize(("worse", "favour"), [(0.15, "opposite"), (0.25, "the worse arm")])
def test_with_a_tenth_of_the_raters_lying_the_verdict_holds_from_this_difference_on(
    worse: float, favour: str
) -> None:
    assert [with_liars(seed, worse, favour) for seed in range(20)].count("worse") == 20


def test_raters_who_lie_without_knowing_the_arm_turn_no_verdict_round() -> None:
    for worse in (0.02, 0.05):
        assert "better" not in {with_liars(seed, worse, "opposite") for seed in range(20)}
