"""Krippendorff's alpha: how far annotators agree beyond chance (Krippendorff, Content Analysis, 2004, chapter 11)."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import permutations
from typing import Literal

Level = Literal["nominal", "ordinal"]


def alpha(units: Iterable[Sequence[Hashable]], values: Sequence[Hashable], level: Level) -> float | None:
    """Alpha of the annotations of each unit: 1 if all agree, about 0 for chance; None if nothing can be compared.

    `values` are all possible values; at level "ordinal" from lowest to highest. Units with one annotation do not count.
    """
    coincidences: defaultdict[tuple[int, int], float] = defaultdict(float)
    for unit in units:
        for pair in permutations([values.index(value) for value in unit], 2):
            coincidences[pair] += 1 / (len(unit) - 1)
    totals = [
        sum(count for (value, _), count in coincidences.items() if value == each)
        for each in range(len(values))
    ]

    def distance(low: int, high: int) -> float:
        if level == "nominal":
            return 1
        return float((sum(totals[low : high + 1]) - (totals[low] + totals[high]) / 2) ** 2)

    observed = expected = 0.0
    for low, high in permutations(range(len(values)), 2):
        apart = distance(min(low, high), max(low, high))
        observed += coincidences[low, high] * apart
        expected += totals[low] * totals[high] * apart
    # All said the same of everything: nothing shows that they can tell it from something else.
    return 1 - (sum(totals) - 1) * observed / expected if expected else None
