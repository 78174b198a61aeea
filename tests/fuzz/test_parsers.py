"""Each parser of foreign bytes takes or refuses any input, by name and within its bounds."""

from collections.abc import Iterator

import pytest
from fuzzing import Target, bounded_memory, mutants

from tests.fuzz.targets import TARGETS


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with bounded_memory():
        yield


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_takes_or_refuses_each_entry_of_its_corpus(target: Target) -> None:
    for data in target.entries.values():
        target.run(data)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_takes_or_refuses_mutants_of_its_corpus(target: Target) -> None:
    for data in mutants(target):
        target.run(data)
