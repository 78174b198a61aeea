"""What the real Filebeat makes of the journal's entries by roles/filebeat/files/processors.yml: one table for both paths."""

import asyncio
import copy
import json
import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filebeat_cases
import jinja2
import lumberjack
import pytest
import yaml
from filebeat_cases import CANARY, CASES, SECONDS, entry
from logstash_pipeline import Running
from plugin_modules import ROOT
from revoked_hosts import Estate

from llmkeep.bundle import cache, programs

NAME, NAMESPACE = "llm1.estate.internal", "llm1"
# What the role's template adds to them.
HOST = {"add_fields": {"target": "", "fields": {"host.name": NAME, "data_stream.namespace": NAMESPACE}}}


@pytest.fixture(scope="module")
def filebeat() -> Path:
    with cache.alone():
        found = programs.find("filebeat")
    if not found:
        pytest.skip("filebeat is not available here: set LLMKEEP_MIRROR to a folder that has it")
    return Path(found)


@contextmanager
def receiving(folder: Path) -> Iterator[tuple[dict[str, Any], "queue.Queue[tuple[Any, Any]]"]]:
    """The output that ships to a receiver by mutual TLS 1.3, and what comes out of Logstash's pipeline: the action and
    the document."""
    with pytest.MonkeyPatch.context() as patch:
        estate = Estate(folder, patch)
        estate.certificate("ops1")
        estate.certificate(NAMESPACE)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "root.pem"))
    tls.minimum_version, tls.verify_mode = ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED
    tls.load_cert_chain(folder / "ops1.pem", folder / "ops1.key")
    (folder / "hosts.json").write_text(json.dumps({f"CN={NAMESPACE}": f"{NAME} {NAMESPACE}"}))
    templates = jinja2.Environment(autoescape=False)  # noqa: S701 - of a configuration
    templates.filters["to_json"] = json.dumps
    common = yaml.safe_load((ROOT / "roles/_common/defaults/main.yml").read_text())
    template = templates.from_string((ROOT / "roles/logstash/templates/logs.conf.j2").read_text())
    pipeline = Running(template.render(common | {"ansible_host": "127.0.0.1"}), folder)
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()

    async def take(events: list[dict[str, Any]], subject: str) -> None:
        for event in events:
            left = pipeline.filtered(event, subject)
            assert left, f"{event} by {subject} was dropped"
            action, document = pipeline.action(left)
            came.put((action["create"], document))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(lumberjack.receiver(take), "127.0.0.1", 0, ssl=tls))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    output = {
        "hosts": [f"127.0.0.1:{server.sockets[0].getsockname()[1]}"],
        "ssl": {
            "supported_protocols": ["TLSv1.3"],
            "certificate_authorities": [str(folder / "root.pem")],
            "certificate": str(folder / f"{NAMESPACE}.pem"),
            "key": str(folder / f"{NAMESPACE}.key"),
        },
    }
    try:
        yield {"output.logstash": output}, came
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both paths read the same file: a document says where it was read."""
    return tmp_path_factory.mktemp("filebeat")


@pytest.fixture(scope="module")
def directly(filebeat: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The document of each case as Filebeat ships it to Elasticsearch."""
    return filebeat_cases.documents(filebeat, folder, HOST)


@pytest.fixture(scope="module")
def by_logstash(filebeat: Path, folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Action and document of each case as they leave Logstash's pipeline, which the stand-in runs."""
    with receiving(folder) as (output, came), filebeat_cases.shipping(filebeat, folder, output, HOST):
        return {case: came.get(timeout=SECONDS) for case in CASES}


@pytest.fixture(scope="module")
def documents(directly: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without what the role's template adds to each."""
    found = copy.deepcopy(directly)
    for document in found.values():
        assert document.pop("host") == {"name": NAME}
        assert document["data_stream"].pop("namespace") == NAMESPACE
    return found


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
    assert CANARY in json.dumps(list(map(entry, CASES)))
    assert CANARY not in json.dumps(documents)


def test_each_entry_has_an_id_of_its_own_and_the_time_at_which_the_journal_took_it(
    documents: dict[str, dict[str, Any]],
) -> None:
    ids = [document["@metadata"]["_id"] for document in documents.values()]
    assert [document["event"]["id"] for document in documents.values()] == ids
    assert len(set(ids)) == len(CASES)
    assert {document["event"]["created"] for document in documents.values()} == {"2026-11-27T18:00:00.000Z"}


def test_no_document_has_the_journals_own_fields(documents: dict[str, dict[str, Any]]) -> None:
    for document in documents.values():
        assert not {"journald", "syslog", "container", "message_id", "line", "host", "uid"} & document.keys()


@pytest.mark.parametrize("case", CASES)
def test_both_paths_yield_the_same_document_in_the_same_stream(
    directly: dict[str, dict[str, Any]],
    by_logstash: dict[str, tuple[dict[str, Any], dict[str, Any]]],
    case: str,
) -> None:
    action, document = by_logstash[case]
    assert document == {name: value for name, value in directly[case].items() if name != "@metadata"}
    # `llmkeep logs check` counts documents by event.id; by _id, what is sent again is one.
    assert action["_id"] == document["event"]["id"] == directly[case]["@metadata"]["_id"]
    assert action["_index"] == f"logs-{document['data_stream']['dataset']}-{NAMESPACE}"
