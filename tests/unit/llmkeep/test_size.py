"""`llmkeep size`: what it reads, what it says, and whether Elasticsearch stores as much."""

import json
import math
import sys
from typing import Any

import pytest
from plugin_modules import ROOT
from search_server import search_server

from llmkeep import size
from llmkeep.cli import main

sys.path.append(str(ROOT / "bench"))
from log_lines import KINDS
from log_sizes import in_elasticsearch
from log_stand import TEMPLATE

SIZES = size.measured()
SETTINGS = {
    "elasticsearch_keep_days": 200,
    "elasticsearch_data_gb": 100,
    "elasticsearch_snapshot_gb": 100,
    "filebeat_queue_mb": 1024,
}
LOGS = ["-i", "inventory/lab", "-i", "inventory/lab-logs"]
DOCUMENTS = 2000  # of each stream
FACTOR = 1.5


def predicted(**load: Any) -> dict[str, Any]:
    given = {"requests": 5.0, "hosts": 4, "system_lines": 20_000, "logins": 1000} | load
    return size.prediction(size.Load(**given), SETTINGS, SIZES)


def test_elasticsearch_stores_what_is_predicted() -> None:
    with search_server() as server:
        server.do("PUT", "/_index_template/llmkeep-logs", TEMPLATE)
        stored = in_elasticsearch(server, dict.fromkeys(KINDS, DOCUMENTS))
    for stream, number in stored.items():
        said = SIZES["bytes_per_document"][stream]
        assert said / FACTOR < number < said * FACTOR, (stream, said, number)


def test_twice_the_requests_take_twice_the_space() -> None:
    once, twice = (predicted(requests=load, system_lines=0, logins=0) for load in (5.0, 10.0))
    assert once["streams"]["llmkeep.edge"]["documents"] == 5 * 86400
    assert once["streams"]["llmkeep.service/audit"]["documents"] == 2 * 5 * 86400
    assert once["streams"]["llmkeep.service"]["documents"] == 5 * 86400 * 1.04
    for name in ("bytes_a_day", "kept_bytes", "data_volume_bytes", "snapshot_bytes"):
        assert twice[name] == pytest.approx(2 * once[name], rel=1e-6)
    assert twice["queue_hours"] == pytest.approx(once["queue_hours"] / 2, rel=0.1)


def test_an_index_ends_after_30_days_or_when_it_is_full() -> None:
    assert predicted(requests=0.1)["shards"] == 4 * 4 * math.ceil(230 / 30)
    busy = predicted(requests=1000.0)
    full = sum(row["bytes"] for row in busy["streams"].values()) * 230 / (10 << 30)
    assert full < busy["shards"] < full + 4 * 4 * 9


def test_what_does_not_suffice_is_named_with_what_is_needed() -> None:
    found = predicted(requests=100.0, hosts=40)
    data, snapshots, shards = size.shortcomings(found, SETTINGS)
    assert data.startswith("elasticsearch_data_gb is 100, but ")
    assert snapshots.startswith("elasticsearch_snapshot_gb is 100, but ")
    # Of 40 hosts, each 8 indices of auth, system and the edge, and 14 of the services, which are full after 17 days.
    assert shards.startswith("there would be 1520 shards")
    assert not size.shortcomings(predicted(requests=0.1), SETTINGS)


def test_budgets_are_read_from_the_inventory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["size", *LOGS, "--requests", "0.001", "--system-lines", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == SETTINGS | {"elasticsearch_data_gb": 2, "elasticsearch_snapshot_gb": 2}
    assert found["hosts"] == 2
    assert main(["size", *LOGS, "--requests", "50"]) == 1
    assert "- elasticsearch_data_gb is 2, but " in capsys.readouterr().out


def test_an_estate_that_keeps_no_logs_is_told_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["size", "-i", "inventory/lab", "--requests", "1"]) == 1
    assert "the group search has 0 hosts and the group logs 0" in capsys.readouterr().err


def test_each_number_was_measured() -> None:
    assert "bench/logs.py" in SIZES["measured_with"]
    for kind in ("bytes_per_document", "journal_bytes_per_line", "queue_bytes_per_document"):
        assert sorted(SIZES[kind]) == sorted(KINDS)
        assert all(number > 50 for number in SIZES[kind].values())
    assert 0.3 < SIZES["snapshot_share"] < 2
