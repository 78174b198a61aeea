"""What the real Filebeat makes of the journal's entries by roles/filebeat/files/processors.yml: one table of cases."""

import json
from pathlib import Path
from typing import Any

import filebeat_cases
import pytest
from filebeat_cases import CANARY, CASES, entry

from llmkeep.bundle import cache, programs


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    with cache.alone():
        filebeat = programs.find("filebeat")
    if not filebeat:
        pytest.skip("filebeat is not available here: set LLMKEEP_MIRROR to a folder that has it")
    return filebeat_cases.documents(Path(filebeat), tmp_path_factory.mktemp("filebeat"))


def found(document: Any, name: str) -> Any:
    """The value of a field, None where there is none."""
    for part in name.split("."):
        document = document.get(part) if isinstance(document, dict) else None
    return document


@pytest.mark.parametrize("case", CASES)
def test_an_entry_becomes_a_document(documents: dict[str, dict[str, Any]], case: str) -> None:
    wanted = CASES[case][4]
    assert {name: found(documents[case], name) for name in wanted} == wanted


def test_neither_a_prompt_nor_an_argument_leaves_the_host(documents: dict[str, dict[str, Any]]) -> None:
    assert CANARY in json.dumps([entry(*case[:4]) for case in CASES.values()])
    assert CANARY not in json.dumps(documents)


def test_no_document_has_the_journals_own_fields(documents: dict[str, dict[str, Any]]) -> None:
    for document in documents.values():
        assert not {"journald", "syslog", "line", "host"} & document.keys()
