"""How often and how soon the guard ends a candidate, by simulated units and raters."""

import random
from collections import defaultdict

import pytest
from guarded_experiment import METRICS, RAILS

from llmserve.feedback.guard import Guarded, Track, harmful

OF = Guarded("support-12", "0" * 16, "subject", 30, METRICS, RAILS)


class Day:
    """A simulated step: two arms' units, whose answers are alike in part, at each look so many more."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a simulation
        self.arms: dict[tuple[str, str], Track] = defaultdict(Track)
        self.habits: dict[tuple[str, str], bool | None] = {}

    def answers(self, test: str, arm: str, units: int, number: int, rate: float, alike: float = 0.2) -> None:
        """NUMBER values of UNITS units, each 1 at RATE; a share of units, ALIKE, always has the same."""
        for _ in range(number):
            unit = f"{arm}-{self.chance.randrange(units)}"
            if (test, unit) not in self.habits:
                fixed = self.chance.random() < alike
                self.habits[test, unit] = self.chance.random() < rate if fixed else None
            habit = self.habits[test, unit]
            self.arms[test, arm].add(unit, 1, float(self.chance.random() < rate if habit is None else habit))


RATES = {"slow": 0.01, "failed": 0.005, "refused": 0.02, "thumb": 0.7, "corrected": 0.1}


def test_a_candidate_that_is_no_worse_is_ended_in_at_most_3_of_100_steps_looked_at_20_times() -> None:
    ended = 0
    for seed in range(100):
        day = Day(seed)
        for _ in range(20):
            for test, rate in RATES.items():
                for arm, units, number in (("control", 380, 76), ("candidate", 60, 12)):
                    day.answers(test, arm, units, number, rate)
            if harmful(OF, 5, day.arms):
                ended += 1
                break
    assert ended <= 3


@pytest.mark.parametrize(("test", "rate"), [("slow", 0.12), ("failed", 0.1), ("refused", 0.2)])
def test_what_a_candidate_does_too_often_ends_it_within_a_thousand_answers(test: str, rate: float) -> None:
    for seed in range(20):
        day = Day(seed)
        for _ in range(20):
            day.answers(test, "control", 950, 950, RATES[test])
            day.answers(test, "candidate", 300, 50, rate)
            if halt := harmful(OF, 5, day.arms):
                break
        assert halt
        assert halt.test == test


def served_before_the_halt(seed: int, worse: float) -> float | None:
    """Part of the planned traffic that a candidate has served when it is ended; None if it is not, on three steps.

    Planned: 5, 25, 50 and 100 % for 14 days each, of 2,000 subjects with 6,000 requests and 400 ratings a day; looked at
    four times a day. A fifth of the subjects always rates the same.
    """
    chance = random.Random(seed)  # noqa: S311 - a simulation
    place = [chance.uniform(0, 100) for _ in range(2000)]
    habits: dict[tuple[int, str], bool | None] = {}
    served = 0.0
    for percent in (5, 25, 50):
        arms: dict[tuple[str, str], Track] = defaultdict(Track)
        for _ in range(14 * 4):
            served += 6000 / 4 * percent / 100
            for _ in range(100):
                subject = chance.randrange(2000)
                arm = "candidate" if place[subject] < percent else "control"
                likes = 0.7 - worse * (arm == "candidate")
                if (subject, arm) not in habits:
                    habits[subject, arm] = chance.random() < likes if chance.random() < 0.2 else None
                habit = habits[subject, arm]
                arms["thumb", arm].add(
                    str(subject), 1, float(chance.random() < likes if habit is None else habit)
                )
            if harmful(OF, percent, arms):
                return served / (4 * 14 * 6000)
    return None


def test_an_arm_15_points_worse_is_ended_before_it_has_served_5_percent_of_the_planned_traffic() -> None:
    served = [served_before_the_halt(seed, 0.15) for seed in range(100, 130)]
    assert sum(part is not None and part < 0.05 for part in served) >= 29, served


def test_an_arm_that_is_rated_as_the_control_is_not_ended() -> None:
    assert [part for seed in range(30) if (part := served_before_the_halt(seed, 0))] == []
