"""`llmkeep logs find` where nothing is found, and how a document reads; tests/lab/containers/test_logs.py shows what it finds."""

from pathlib import Path

import pytest

from llmkeep import logs
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places


def test_a_host_that_is_no_control_node_of_an_estate_with_logs_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(LlmkeepError, match=r"etc/llmkeep/logs\.url is not there: .* in the group search"):
        logs.find(Places(tmp_path), "r-1")


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
