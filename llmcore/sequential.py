"""Statistics that may be looked at after each observation: intervals of a difference, and a test of the shares.

With probability 1 - ALPHA a confidence sequence covers the truth at every look, however many there are, so that checking the
results each day costs nothing. This one is Robbins' normal mixture in the asymptotic form of Waudby-Smith, Arbour, Sinha,
Kennedy and Ramdas (2024, "Time-uniform central limit theory and asymptotic confidence sequences"): of an estimate with
variance V, seen as Brownian motion at time 1/V.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

Cluster = tuple[int, float]  # how many values it has, at least one, and their sum
FEWEST = 30  # clusters of an arm; the sequence rests on a central limit theorem


@dataclass(frozen=True)
class Mean:
    """The mean of an arm's values, and its variance, robust to values of one cluster that are alike."""

    clusters: int
    values: int
    mean: float
    variance: float


@dataclass
class Sums:
    """What is known of an arm's clusters without them: enough for their mean and its variance, in constant time and memory."""

    clusters: int = 0
    values: float = 0.0
    total: float = 0.0
    values_squared: float = 0.0
    crossed: float = 0.0
    total_squared: float = 0.0

    def add(self, cluster: Cluster, times: int = 1) -> None:
        """Count a cluster; -1 times takes it out, as before it grows."""
        number, total = cluster
        self.clusters += times
        self.values += times * number
        self.total += times * total
        self.values_squared += times * number * number
        self.crossed += times * number * total
        self.total_squared += times * total * total

    def mean(self) -> Mean:
        """The mean of values that come in clusters: all ratings of one subject, say.

        Clusters are independent, values within one need not be. The variance is the linearised one of a ratio of two sums, as
        survey statistics and cluster-robust regression on a constant have it (HC1, with clusters / (clusters - 1)).
        """
        many = self.clusters
        middle = self.total / self.values if self.values else 0.0
        if many < 2:
            return Mean(many, int(self.values), middle, math.inf)
        squares = self.total_squared - 2 * middle * self.crossed + middle * middle * self.values_squared
        return Mean(many, int(self.values), middle, max(squares, 0.0) / self.values**2 * many / (many - 1))


def summed(clusters: Iterable[Cluster]) -> Sums:
    """The sums of these clusters."""
    sums = Sums()
    for cluster in clusters:
        sums.add(cluster)
    return sums


def mean(clusters: Iterable[Cluster]) -> Mean:
    """The mean of these clusters' values."""
    return summed(clusters).mean()


def tuning(alpha: float) -> float:
    """The mixture's variance, as a share of the time at which the sequence is to be narrowest."""
    wide = -2 * math.log(alpha)
    return 1 / (wide + math.log(wide + 1))


def margin(variance: float, planned: float, alpha: float) -> float:
    """Half the width of the interval of an estimate with this variance, narrowest where that is PLANNED."""
    time, mixed = 1 / variance, tuning(alpha) / planned
    return math.sqrt((time + mixed) * math.log((time + mixed) / (mixed * alpha**2))) / time


def difference(
    control: Sequence[Cluster],
    candidate: Sequence[Cluster],
    planned: float,
    alpha: float,
    fewest: int = FEWEST,
) -> tuple[float, float]:
    """The interval of candidate less control, whose values are of 0 to 1; all numbers, where an arm has too few clusters.

    To each arm a value of 0 and one of 1 is added: of rare events the variance is underestimated, or 0, and without it the
    interval would exclude 0 far too often (Agresti and Caffo 2000, "Simple and effective confidence intervals for proportions").
    """
    if min(len(control), len(candidate)) < fewest:
        return -math.inf, math.inf
    one, other = (mean([*arm, (1, 0.0), (1, 1.0)]) for arm in (control, candidate))
    half = margin(one.variance + other.variance, planned, alpha)
    return other.mean - one.mean - half, other.mean - one.mean + half


def surely_above(high: Mean, low: Mean, times: float, more: float, planned: float, alpha: float) -> bool:
    """Whether the true mean of HIGH is above that of LOW, TIMES so much and MORE, at any look with error ALPHA at most.

    PLANNED: the variance of HIGH less TIMES LOW at which it is to be seen best. False where a variance is not known.
    """
    variance = high.variance + times * times * low.variance
    if not 0 < variance < math.inf:
        return False
    return high.mean - times * low.mean - more > margin(variance, planned, alpha)


def planned_for(difference: float, alpha: float, power: float = 0.95) -> float:
    """The variance of an estimate at which a difference is found with this power."""
    return (difference / effect_found(1, power, alpha)) ** 2


def effect_found(variance: float, power: float, alpha: float) -> float:
    """The smallest difference that is found with this power, where the estimate has this variance."""
    return (margin(1, 1, alpha) + NormalDist().inv_cdf(power)) * math.sqrt(variance)


def mismatch(counts: Sequence[int], shares: Sequence[float]) -> float:
    """How much the counts speak against these shares, as odds (an e-value), which may be looked at any time as well.

    At 1,000 they are no accident: below the shares it comes to that in one of 1,000 experiments at most. It is the Bayes factor
    of a uniform Dirichlet prior (Lindon and Malek 2022, "Anytime-valid inference for multinomial count data").
    """
    prior = math.lgamma(len(counts)) - math.lgamma(sum(counts) + len(counts))
    arrangements = sum(math.lgamma(count + 1) for count in counts)
    declared = sum(count * math.log(share) for count, share in zip(counts, shares, strict=True))
    return math.exp(min(prior + arrangements - declared, 700))
