"""`llmkeep logs find` where nothing is found, and how a document reads; tests/lab/containers/test_logs.py shows what it finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from elastic_transport import ApiResponseMeta, HttpHeaders, NodeConfig
from elasticsearch import ApiError

from llmkeep import logs
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places


def test_a_host_that_is_no_control_node_of_an_estate_with_logs_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(LlmkeepError, match=r"etc/llmkeep/logs\.url does not exist: .* in the group search"):
        logs.find(Places(tmp_path), "r-1")


class Shards:
    """A client of streams of which one has no shard for the first searches."""

    def __init__(self, unavailable: int) -> None:
        self.unavailable = unavailable

    def search(self, **_asked: Any) -> dict[str, Any]:
        self.unavailable -= 1
        if self.unavailable >= 0:
            node = NodeConfig("https", "ops1", 9200)
            raise ApiError(
                "search_phase_execution_exception", ApiResponseMeta(503, "1.1", HttpHeaders(), 0.0, node), {}
            )
        return {"hits": {"hits": [{"_source": {"message": "answered"}}]}}


def with_shards(monkeypatch: pytest.MonkeyPatch, unavailable: int) -> None:
    @contextmanager
    def asked(_places: Places) -> Iterator[Shards]:
        yield Shards(unavailable)

    monkeypatch.setattr(logs, "asked", asked)


def test_a_stream_that_has_no_shard_yet_is_asked_again_while_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_shards(monkeypatch, 2)
    assert logs.find(Places(), "r-1", seconds=10) == [{"message": "answered"}]


def test_shards_that_are_away_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with_shards(monkeypatch, 1)
    with pytest.raises(ApiError):
        logs.find(Places(), "r-1")


def test_a_document_is_a_line_that_cannot_redraw_a_terminal() -> None:
    document = {
        "@timestamp": "2026-11-27T17:59:59.123Z",
        "host": {"name": "llm1.estate.internal"},
        "service": {"name": "llm-gateway@1.service"},
        "agent": {"type": "filebeat"},
        "user": {"id": "ada\x1b[2J"},
        "message": "answered",
    }
    assert logs.line(document) == (
        "2026-11-27T17:59:59.123Z llm1.estate.internal llm-gateway@1.service "
        r'{"message": "answered", "user": {"id": "ada\u001b[2J"}}'
    )
