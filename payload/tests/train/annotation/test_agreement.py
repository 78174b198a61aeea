"""Krippendorff's alpha is that of the package `krippendorff`, and that of Krippendorff's own example."""

from typing import Any

import krippendorff
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.annotation.agreement import Level, alpha

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section D: four observers, twelve units, five values.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
STARS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_alpha_of_the_published_example(level: Level, published: float) -> None:
    units = [[value for value in unit if value is not None] for unit in zip(*OBSERVERS, strict=True)]
    assert alpha(units, STARS, level) == pytest.approx(published, abs=5e-4)


@given(
    units=st.lists(st.lists(st.sampled_from(STARS), max_size=4), max_size=12),
    level=st.sampled_from(["nominal", "ordinal"]),
)
@settings(deadline=None)
def test_alpha_is_that_of_the_package(units: list[list[int]], level: Any) -> None:
    counts = numpy.array([[unit.count(value) for value in STARS] for unit in units]).reshape(-1, len(STARS))
    compared = {value for unit in units if len(unit) > 1 for value in unit}
    if len(compared) < 2:  # the package divides by zero, or refuses
        assert alpha(units, STARS, level) is None
    else:
        theirs = krippendorff.alpha(value_counts=counts, value_domain=STARS, level_of_measurement=level)
        assert alpha(units, STARS, level) == pytest.approx(theirs)


def test_equal_annotations_of_different_values_agree_wholly() -> None:
    assert alpha([["A", "A"], ["B", "B"]], ["A", "B"], "nominal") == 1


def test_agreement_is_not_defined_where_values_do_not_vary_or_nothing_was_annotated_twice() -> None:
    assert alpha([["A", "A"], ["A", "A"]], ["A", "B"], "nominal") is None
    assert alpha([["A"], ["B"]], ["A", "B"], "nominal") is None
