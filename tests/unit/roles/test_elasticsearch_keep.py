"""elasticsearch-keep on the real Elasticsearch: what is deleted, what comes back, and a volume that does not fill.

The program's clock is moved; Elasticsearch's is not. Instead of TLS and passwords, requests go over plain HTTP here.
"""

import argparse
import json
import os
import random
import re
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_modules import ROOT
from search_server import SearchServer, search_server

FILES = ROOT / "roles/elasticsearch/files"
PROGRAM = runpy.run_path(str(FILES / "elasticsearch_keep.py"))
DAY = 86400
STREAM = "logs-llmkeep.system-llm1"
VOLUME_MB = 128
BUDGET_MB = 60
TEMPLATE = {
    "index_patterns": ["logs-llmkeep.*-*"],
    "data_stream": {},
    "template": {
        "settings": {"number_of_replicas": 0, "store.stats_refresh_interval": "0s"},  # 10 s otherwise
        # Of a long message nothing is kept but itself, so that a volume fills by what is written.
        "mappings": {"properties": {"message": {"type": "keyword", "index": False, "doc_values": False}}},
    },
}
PLAIN = f"""
import http.client, runpy, sys
PORT = int(sys.argv.pop(1))
program = runpy.run_path({str(FILES / "elasticsearch_request.py")!r})
def asked(method, path, body, given):
    link = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    link.request(method, path, body.encode() if body else None, given)
    answer = link.getresponse()
    return True, f"{{answer.status}} {{answer.read().decode().strip()}}"
program["main"].__globals__.update(asked=asked, headers=lambda user: {{"Content-Type": "application/json"}})
sys.exit(program["main"]())
"""


@pytest.fixture(scope="module")
def node() -> Iterator[SearchServer]:
    """Elasticsearch whose data has a small volume of its own, where tests may mount one."""
    with search_server(VOLUME_MB) as server:
        yield server


@pytest.fixture
def fresh(node: SearchServer) -> SearchServer:
    """Without streams and snapshots, and with the repository."""
    node.do("DELETE", "/_data_stream/logs-llmkeep.*")
    node.do("PUT", "/_index_template/llmkeep-logs", TEMPLATE)
    register(node)
    if node.do("GET", "/_snapshot/llmkeep/_all")["snapshots"]:
        node.do("DELETE", "/_snapshot/llmkeep/*")
    return node


def register(node: SearchServer) -> None:
    node.do("PUT", "/_snapshot/llmkeep", {"type": "fs", "settings": {"location": str(node.snapshots)}})


Keep = Callable[..., tuple[int, str]]


@pytest.fixture
def keep(
    node: SearchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Keep:
    """The program with these words, so many days from now: its exit code, and what it said."""
    plain = tmp_path / "plain.py"
    plain.write_text(PLAIN)
    scope = PROGRAM["main"].__globals__
    monkeypatch.setitem(scope, "REQUEST", [sys.executable, str(plain), str(node.port)])

    def kept(*words: str, days: float = 0) -> tuple[int, str]:
        if words[0] == "run":
            words = (*words, "--state", str(tmp_path / "kept.json"))
        with monkeypatch.context() as patch:
            clock = time.time
            patch.setattr(time, "time", lambda: clock() + days * DAY)
            patch.setattr(sys, "argv", ["elasticsearch-keep", *words])
            capfd.readouterr()
            code = PROGRAM["main"]()
        said = capfd.readouterr()
        return code, said.out + said.err

    return kept


def nightly(days: int = 200, snapshots: int = 3, budget: int = BUDGET_MB) -> tuple[str, ...]:
    return "run", "--days", str(days), "--snapshots", str(snapshots), "--budget-mb", str(budget)


def index(node: SearchServer, count: int, stream: str = STREAM, padding: int = 0) -> None:
    """So many documents, each with a request of its own, on the disk."""
    lines = []
    for number in range(count):
        document = {
            "@timestamp": "2026-11-27T12:00:00Z",
            "http": {"request": {"id": f"r-{number}"}},
            "message": random.randbytes(padding).hex(),  # noqa: S311 - no secret; does not compress
        }
        lines += ['{"create":{}}', json.dumps(document)]
    answer = node.do("POST", f"/{stream}/_bulk?refresh=true", "\n".join(lines) + "\n")
    assert not answer["errors"], next(item for item in answer["items"] if "error" in item["create"])
    node.do("POST", f"/{stream}/_flush")


def indices(node: SearchServer, stream: str = STREAM) -> list[str]:
    [found] = node.do("GET", f"/_data_stream/{stream}")["data_streams"]
    return [index["index_name"] for index in found["indices"]]


def count(node: SearchServer, query: str = "*") -> int:
    return int(node.do("GET", f"/logs-llmkeep.*/_count?q={query}")["count"])


def test_all_streams_come_back_under_their_names_after_the_data_is_lost(
    fresh: SearchServer, keep: Keep
) -> None:
    index(fresh, 500)
    index(fresh, 20, stream="logs-llmkeep.edge-llm1")
    assert keep(*nightly())[0] == 0
    assert keep("check") == (0, "good\n")
    fresh.lose_data()
    assert fresh.ask("GET", f"/{STREAM}/_count")[0] == 404
    fresh.do("PUT", "/_index_template/llmkeep-logs", TEMPLATE)
    register(fresh)
    index(fresh, 3, stream="logs-llmkeep.edge-llm1")  # its shipper was faster
    assert keep(*nightly(), days=1)[0] == 0  # and the timer, which took a snapshot of what is left
    code, said = keep("restore")
    good, _ = said.splitlines()[1:]
    assert (code, good.split(": ")[1]) == (1, "2 streams, 2 indices")
    code, said = keep("restore", good.split(":")[0])
    assert code == 0, said
    assert count(fresh) == 500 + 20 + 3
    names = [stream["name"] for stream in fresh.do("GET", "/_data_stream")["data_streams"]]
    assert sorted(names) == ["logs-llmkeep.edge-llm1", "logs-llmkeep.edge-llm1_restored", STREAM]
    assert count(fresh, "http.request.id:%22r-499%22") == 1
    index(fresh, 1)
    assert count(fresh) == 524, "a stream that came back takes no documents"


def test_a_removed_document_does_not_come_back_with_a_restore(fresh: SearchServer, keep: Keep) -> None:
    """Documents that gateways search are in no snapshot."""
    index(fresh, 5)
    fresh.do("PUT", "/llmkeep-documents-32-0", {"aliases": {"llmkeep-documents": {}}})
    fresh.do("PUT", "/llmkeep-documents/_doc/passage?refresh=true", {"text": "heron-7461"})
    assert keep(*nightly())[0] == 0
    [snapshot] = fresh.do("GET", "/_snapshot/llmkeep/_all")["snapshots"]
    assert [name for name in snapshot["indices"] if not name.startswith(".ds-logs-llmkeep.")] == []
    fresh.do("DELETE", "/llmkeep-documents-32-0")
    code, output = keep("restore", snapshot["snapshot"])
    assert code == 0, output
    assert fresh.ask("GET", "/llmkeep-documents/_count")[0] == 404
    everything = "/_all/_count?expand_wildcards=all&q=text:heron"
    assert fresh.do("GET", everything)["count"] == 0


def test_a_restore_waits_for_primaries_that_are_still_on_their_way() -> None:
    """As Elasticsearch 9.5.3 said at once after a restore was accepted, and before a primary had its turn."""
    health = (
        '{{"status":"{}","active_primary_shards":{},"initializing_shards":{},"unassigned_primary_shards":{}}}'
    )
    all_there = PROGRAM["ALL_THERE"]
    assert not re.search(all_there, health.format("yellow", 0, 1, 0))
    assert not re.search(all_there, health.format("yellow", 1, 0, 1))
    assert re.search(all_there, health.format("green", 2, 0, 0))


@pytest.mark.usefixtures("fresh")
def test_a_snapshot_that_is_not_there_is_refused_with_those_that_are(keep: Keep) -> None:
    code, said = keep("restore", "logs-x")
    assert code == 1
    assert said.endswith("before the loss:\nthere is none\n")
    assert keep("check") == (1, "there is no whole snapshot: see `journalctl -u llmkeep-logs-keep`\n")


def test_the_newest_snapshots_stay(fresh: SearchServer, keep: Keep) -> None:
    index(fresh, 1)
    for days in range(3):
        assert keep(*nightly(snapshots=2), days=days)[0] == 0
    there = fresh.do("GET", "/_snapshot/llmkeep/_all?sort=start_time")["snapshots"]
    assert len(there) == 2
    code, said = keep("check", days=3)
    assert code == 1
    assert said.startswith("the newest whole snapshot is 3.0 days old")


def test_a_repository_that_cannot_be_written_is_a_failure_and_no_new_snapshot(
    fresh: SearchServer, keep: Keep, tmp_path: Path
) -> None:
    index(fresh, 1)
    assert keep(*nightly())[0] == 0
    before = json.loads((tmp_path / "kept.json").read_text())["snapshot"]
    away = fresh.snapshots.rename(fresh.snapshots.with_name("away"))
    fresh.snapshots.touch()
    try:
        code, said = keep(*nightly(), days=1)
        assert code == 1
        assert "/_snapshot/llmkeep/_verify" in said
        assert keep("check")[0] == 1
    finally:
        fresh.snapshots.unlink()
        away.rename(fresh.snapshots)
    assert json.loads((tmp_path / "kept.json").read_text())["snapshot"] == before


def test_an_index_goes_when_its_time_is_over_and_the_one_written_to_never_does(
    fresh: SearchServer, keep: Keep
) -> None:
    index(fresh, 10)
    fresh.do("POST", f"/{STREAM}/_rollover")
    index(fresh, 5)
    old, written = indices(fresh)
    assert keep(*nightly(days=200), days=199.9) == (0, "")
    code, said = keep(*nightly(days=200), days=200.1)
    assert (code, said) == (0, f"deleted {old}: kept for 200 days\n")
    assert indices(fresh) == [written]
    assert keep(*nightly(days=200), days=4000) == (0, "")
    assert count(fresh) == 5


def test_no_setting_deletes_what_is_younger_than_180_days(fresh: SearchServer, keep: Keep) -> None:
    index(fresh, 10)
    fresh.do("POST", f"/{STREAM}/_rollover")
    code, said = keep(*nightly(days=1, budget=0), days=179.9)
    assert code == 1
    assert "so nothing more is deleted: enlarge the volume" in said
    assert len(indices(fresh)) == 2


def test_more_than_the_volume_holds_never_reaches_the_flood_stage(
    fresh: SearchServer, keep: Keep, node: SearchServer
) -> None:
    if not os.path.ismount(node.data):
        pytest.skip("no tmpfs can be mounted here")
    most = 0.0
    written = 0
    for _ in range(15):
        index(fresh, 1250, padding=4000)
        written += 1250 * 4000 * 2
        fresh.do("POST", f"/{STREAM}/_rollover")
        # All of it is less than 200 days old, and older than 180.
        code, said = keep(*nightly(days=200), days=181)
        assert code == 0, said
        volume = shutil.disk_usage(node.data)
        most = max(most, 1 - volume.free / volume.total)
    assert written > VOLUME_MB << 20
    assert most < 0.85, "the low watermark was reached"
    blocks = fresh.do("GET", "/logs-llmkeep.*/_settings/index.blocks.*")
    assert not any(found["settings"] for found in blocks.values())


class Answers:
    """In Elasticsearch's place: what was asked, by answers that are made up and refusals of some paths."""

    def __init__(
        self, states: dict[str, str], refused: tuple[str, ...] = (), next_state: str = "SUCCESS"
    ) -> None:
        self.states, self.refused, self.next_state = states, refused, next_state
        self.asked: list[str] = []

    def __call__(self, method: str, path: str, *_: object, **__: object) -> Any:
        self.asked.append(f"{method} {path.partition('?')[0]}")
        if any(part in path for part in self.refused):
            raise PROGRAM["Refused"](path)
        if method == "PUT":
            self.states[path.rpartition("/")[2]] = self.next_state
        if "/_snapshot/llmkeep/" in path and method == "GET":
            one = path.partition("?")[0].rpartition("/")[2]
            names = self.states if one == "_all" else [one]
            return {"snapshots": [{"snapshot": n, "state": self.states[n], "failures": []} for n in names]}
        if path.startswith("/_data_stream"):
            return {
                "data_streams": [
                    {"name": s, "indices": [{"index_name": f"{s}-{n}"} for n in range(3)]} for s in "ab"
                ]
            }
        if "_settings" in path:
            return {
                f"{s}-{n}": {"settings": {"index": {"creation_date": "0"}}} for s in "ab" for n in range(3)
            }
        if "_stats" in path:
            return {
                "indices": {
                    "a-0": {"total": {"store": {"size_in_bytes": 5}, "translog": {"size_in_bytes": 0}}}
                }
            }
        return {}


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], list[str]]:
    """A night with these answers: the problems that it names."""

    def night(answers: Answers) -> list[str]:
        monkeypatch.setitem(PROGRAM["run"].__globals__, "ask", answers)
        options = argparse.Namespace(days=200, snapshots=1, budget_mb=1, state=tmp_path / "kept.json")
        problems: list[str] = PROGRAM["run"](options)
        return problems

    return night


Night = Callable[[Answers], list[str]]


def deleted(answers: Answers) -> list[str]:
    return [asked.rpartition("/")[2] for asked in answers.asked if asked.startswith("DELETE")]


OLD, FAILED, PARTIAL = (f"logs-2026010{day}-020000" for day in (1, 2, 3))


@pytest.mark.parametrize("state", ["SUCCESS", "PARTIAL"])
def test_snapshots_that_failed_before_the_newest_whole_one_go(answered: Night, state: str) -> None:
    there = {OLD: "SUCCESS", FAILED: "FAILED", "by-hand": "PARTIAL", PARTIAL: "PARTIAL"}
    answers = Answers(there, next_state=state)
    assert bool(answered(answers)) == (state != "SUCCESS")
    gone = [name for name in deleted(answers) if not name.startswith(("a-", "b-"))]
    assert gone == ([OLD, FAILED, PARTIAL] if state == "SUCCESS" else [])
    there = {FAILED: "FAILED", OLD: "SUCCESS", PARTIAL: "PARTIAL"}
    answers = Answers(there, next_state="FAILED")
    answered(answers)
    assert deleted(answers) == [FAILED], "what failed later may have what no whole snapshot has"


def test_no_index_goes_without_a_whole_snapshot(answered: Night, tmp_path: Path) -> None:
    answers = Answers({}, next_state="PARTIAL")
    assert "is PARTIAL" in answered(answers)[0]
    assert deleted(answers) == []
    assert len(json.loads((tmp_path / "kept.json").read_text())["sizes"]) == 1


def test_what_is_refused_keeps_no_other_stream_or_index_from_its_turn(answered: Night) -> None:
    answers = Answers({}, refused=("/a/_rollover", "/a-0"))
    assert answered(answers) == ["/a/_rollover", "/a-0"]
    assert "POST /b/_rollover" in answers.asked
    assert sorted(deleted(answers)) == ["a-0", "a-1", "b-0", "b-1"]


@pytest.mark.parametrize("left", ["", "[]", '{"sizes": [[1'])
def test_a_state_that_cannot_be_read_is_none(answered: Night, tmp_path: Path, left: str) -> None:
    (tmp_path / "kept.json").write_text(left)
    assert answered(Answers({})) == []
    assert json.loads((tmp_path / "kept.json").read_text())["snapshot"] > 0


@pytest.mark.parametrize(("method", "done"), [("DELETE", True), ("GET", False)])
def test_what_is_gone_is_deleted(monkeypatch: pytest.MonkeyPatch, method: str, done: bool) -> None:
    said = [sys.executable, "-c", "print('404 {}')"]
    monkeypatch.setitem(PROGRAM["ask"].__globals__, "REQUEST", said)
    with nullcontext() if done else pytest.raises(PROGRAM["Refused"]):
        assert PROGRAM["ask"](method, "/x") == {}


ENDS = st.dictionaries(st.text(max_size=3), st.floats(0, 400 * DAY), max_size=12)


@given(ENDS, st.integers(180, 400), st.integers(0, 10), st.randoms())
def test_what_is_deleted_is_old_and_the_oldest(
    ends: dict[str, float], days: int, budget: int, chance: random.Random
) -> None:
    now = 400 * DAY
    size = {name: chance.randrange(4) for name in ends}
    gone = PROGRAM["expired"](ends, size, now, days, budget)
    left = [name for name in ends if name not in gone]
    assert all(now - ends[name] > 180 * DAY for name in gone)
    assert all(ends[one] <= ends[other] for one in gone for other in left)
    assert all(now - ends[name] <= days * DAY for name in left)
    if sum(size[name] for name in left) > budget:
        assert all(now - ends[name] <= 180 * DAY for name in left)


def test_the_budget_is_reached_when_growth_says_so() -> None:
    reached = PROGRAM["reached"]
    assert reached([[0, 100.0], [2 * DAY, 300.0]], 1000) == pytest.approx(9 * DAY)
    assert reached([[0, 300.0], [2 * DAY, 300.0]], 1000) is None
    assert reached([[0, 100.0], [3600, 300.0]], 1000) is None
    assert reached([[5.0, 1000.0]], 1000) == 5.0
