"""When Elasticsearch already has what is declared: keys that it adds are no difference, everything else is."""

import copy
from typing import Any

import pytest
from plugin_modules import load

ask = load("module_utils.search.ask")

WANTED: dict[str, Any] = {
    "cluster": ["cluster:monitor/main"],
    "indices": [{"names": ["logs-llmkeep.*-llm1"], "privileges": ["create_doc", "auto_configure"]}],
}


def answered() -> Any:
    """A role as Elasticsearch tells it, with keys of its own."""
    found = copy.deepcopy(WANTED)
    found["indices"][0]["allow_restricted_indices"] = False
    return found | {"applications": [], "run_as": []}


def test_keys_that_elasticsearch_adds_are_no_difference() -> None:
    assert ask.has(answered(), WANTED)


@pytest.mark.parametrize(
    "more",
    [
        {"cluster": ["cluster:monitor/main", "all"]},
        {"indices": [*WANTED["indices"], {"names": ["*"]}]},
        {"cluster": []},
    ],
)
def test_a_role_that_may_more_or_less_is_another_one(more: dict[str, Any]) -> None:
    assert not ask.has(answered() | more, WANTED)


def test_a_document_that_is_not_there_is_not_the_one() -> None:
    assert not ask.has(None, WANTED)
