"""What `llmkeep logs check` makes of counts and documents; tests/lab/containers/test_logs.py shows it against the real server."""

import json
import runpy
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml
from elasticsearch import Elasticsearch
from plugin_modules import ROOT
from search_server import search_server

from llmkeep import logs_check
from llmkeep.logs_check import Source, Window

BEGIN = 1_795_816_800_000  # 2026-11-27T22:00:00Z
COUNTED = runpy.run_path(str(ROOT / "roles/filebeat/files/journal_count.py"))


def entry(number: int, milliseconds: float, message: str = "", journal: str = "j1") -> dict[str, Any]:
    """An entry as `journalctl --output=json` prints it."""
    return {
        "__SEQNUM_ID": journal,
        "__SEQNUM": str(number),
        "__REALTIME_TIMESTAMP": str(round(milliseconds * 1000)),
        "__CURSOR": f"s={journal};i={number:x}",
        "MESSAGE": message or f"message {number}",
    }


def said(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a host says of its entries."""
    return [json.loads(window.line()) for window, _ in COUNTED["windows"](entries)]


def counted(lines: list[dict[str, Any]]) -> list[Window]:
    """The windows that the control node makes of it, from documents as Filebeat makes them."""
    short = "llmkeep.journal."
    return [
        logs_check.window(
            {
                "llmkeep": {
                    "journal": {key.removeprefix(short): line[key] for key in line if key.startswith(short)}
                }
            }
        )
        for line in lines
    ]


def judged(windows: list[Window], times: Sequence[float]) -> Source:
    """The result for documents of TIMES, each of another entry."""
    source = Source()
    groups = logs_check.together(logs_check.continued(logs_check.by_number(windows), source.notes))
    counts = []
    for group in groups:
        begins, ends = min(each.begins for each in group), max(each.ends for each in group)
        there = sum(begins <= int(time) <= ends for time in times)
        counts.append((there, there))
    logs_check.judge(source, groups, counts)
    return source


def test_a_host_counts_in_windows_that_end_between_milliseconds() -> None:
    lines = said([entry(number, BEGIN + number // 3) for number in range(1, 251)])
    assert [(line["llmkeep.journal.from"], line["llmkeep.journal.to"]) for line in lines] == [
        (1, 101),
        (102, 203),
        (204, 250),
    ]
    assert sum(line["llmkeep.journal.entries"] for line in lines) == 250
    assert lines[0]["llmkeep.journal.last"] < lines[1]["llmkeep.journal.first"]


def test_entries_that_are_the_same_in_all_that_names_a_document_are_one() -> None:
    entries = [
        entry(1, BEGIN, "same"),
        entry(2, BEGIN, "same"),
        entry(3, BEGIN, "other"),
        entry(4, BEGIN + 1, "same"),
    ]
    assert [line["llmkeep.journal.entries"] for line in said(entries)] == [3]


def test_messages_that_are_too_long_to_be_printed_are_told_apart_by_the_journals_own_hash() -> None:
    entries = [
        entry(number, BEGIN) | {"MESSAGE": None, "__CURSOR": f"i={number};x={number // 2}"}
        for number in (1, 2, 3)
    ]
    assert [line["llmkeep.journal.entries"] for line in said(entries)] == [2]


def test_the_counted_identity_is_the_documents() -> None:
    """The fields of the fingerprint, by their names in the journal."""
    names = {
        "@timestamp": "__REALTIME_TIMESTAMP",
        "host.id": "_MACHINE_ID",
        "journald.host.boot_id": "_BOOT_ID",
        "journald.pid": "_PID",
        "systemd.transport": "_TRANSPORT",
        "systemd.unit": "_SYSTEMD_UNIT",
        "syslog.identifier": "SYSLOG_IDENTIFIER",
        "message": "MESSAGE",
    }
    first = yaml.safe_load((ROOT / "roles/filebeat/files/processors.yml").read_text())[0]
    assert tuple(names[name] for name in first["fingerprint"]["fields"]) == COUNTED["IDENTITY"]


def test_no_processor_drops_an_entry_so_that_each_is_a_document() -> None:
    assert "drop_event" not in (ROOT / "roles/filebeat/files/processors.yml").read_text()
    assert "drop_event" not in (ROOT / "roles/filebeat/templates/filebeat.yml.j2").read_text()


def test_all_there_is_no_gap() -> None:
    entries = [entry(number, BEGIN + number) for number in range(1, 301)]
    source = judged(counted(said(entries)), [BEGIN + number for number in range(1, 301)])
    assert not source.gaps
    assert not source.notes
    assert [(name, hour.written, hour.indexed) for name, hour in source.hours.items()] == [
        ("2026-11-27T22:00:00.000Z", 300, 300)
    ]


def test_a_gap_is_named_by_hour_and_sequence_numbers() -> None:
    entries = [entry(number, BEGIN + number) for number in range(1, 301)]
    source = judged(
        counted(said(entries)), [BEGIN + number for number in range(1, 301) if not 120 <= number < 125]
    )
    [gap] = source.gaps
    assert (gap.hour, gap.first, gap.last, gap.missing) == ("2026-11-27T22:00:00.000Z", 101, 200, 5)
    assert logs_check.code({"llm1": source}) == logs_check.MISSING
    assert "llm1 2026-11-27T22: GAP: 5 of sequence numbers 101 to 200" in "\n".join(
        logs_check.lines({"llm1": source})
    )


@pytest.mark.parametrize(("shipped", "missing"), [(True, 0), (False, 40)])
def test_what_left_the_journal_before_it_was_counted_is_missing_unless_it_was_shipped(
    shipped: bool, missing: int
) -> None:
    entries = [entry(number, BEGIN + number) for number in range(1, 101)]
    windows = counted(said(entries[:30])) + counted(said(entries[70:]))
    times = [BEGIN + number for number in range(1, 101) if shipped or not 30 < number <= 70]
    source = judged(windows, times)
    assert [(gap.first, gap.last, gap.missing) for gap in source.gaps] == ([(31, 70, 40)] if missing else [])
    assert [
        "sequence numbers 31 to 70 left the journal before they were counted" in note for note in source.notes
    ] == [True]


def test_a_host_that_was_set_up_anew_is_told_and_no_gap() -> None:
    old = [entry(number, BEGIN + number) for number in range(1, 51)]
    new = [entry(number, BEGIN + 1000 + number, journal="j2") for number in range(1, 51)]
    source = judged(
        counted(said(old + new)), [int(each["__REALTIME_TIMESTAMP"]) / 1000 for each in old + new]
    )
    assert not source.gaps
    [note] = source.notes
    assert "a new journal began" in note
    assert "after sequence number 50" in note


def test_a_clock_that_went_back_is_told_and_its_windows_are_judged_together() -> None:
    before = [entry(number, BEGIN + 60_000 + number) for number in range(1, 51)]
    after = [entry(number, BEGIN + 59_990 + number) for number in range(51, 101)]
    late = [entry(number, BEGIN + 30_000 + number) for number in range(101, 121)]
    entries = before + after + late
    times = [int(each["__REALTIME_TIMESTAMP"]) / 1000 for each in entries]
    # Elasticsearch has them by time.
    windows = sorted(counted(said(entries)), key=lambda each: each.begins)
    assert [each.first for each in windows] != sorted(each.first for each in windows)
    source = judged(windows, times)
    assert not source.gaps
    [note] = source.notes
    assert "the clock went back by 30 s at sequence number 101" in note
    [gap] = judged(counted(said(entries)), times[1:]).gaps
    assert (gap.first, gap.last, gap.missing) == (1, 100, 1)


def test_a_count_that_a_kill_repeated_counts_once() -> None:
    entries = [entry(number, BEGIN + number) for number in range(1, 101)]
    windows = counted(said(entries))
    source = judged([*windows, *windows], [BEGIN + number for number in range(1, 101)])
    assert not source.gaps
    assert [hour.written for hour in source.hours.values()] == [100]


def test_documents_that_are_there_twice_are_counted_and_hide_no_gap() -> None:
    source = Source()
    logs_check.judge(source, [[Window("j1", 1, 10, 10, BEGIN, BEGIN + 9)]], [(11, 9)])
    [hour] = source.hours.values()
    assert (hour.missing, hour.duplicates, hour.indexed) == (1, 2, 9)


def test_counters_begin_anew_with_each_start_of_filebeat() -> None:
    source = Source()
    numbers = [(50, 0, 1), (70, 0, 1), (10, 2, 3), (20, 0, 0)]
    logs_check.grown(
        source,
        [
            (BEGIN + minute, {"acked": acked, "dropped": dropped, "duplicates": duplicates})
            for minute, (acked, dropped, duplicates) in enumerate(numbers)
        ],
    )
    [hour] = source.hours.values()
    # The last start shipped more than the one before it had.
    assert (hour.shipped, hour.dropped, hour.refused_twice) == (50, 2, 3)


class Server:
    """A stand-in for the client: what hosts said, and documents by time and id; LATE of them come with the second search.

    Its `cardinality` takes ids with the same first eight letters for one, as the real one those with the same 25 bits of hash.
    """

    def __init__(
        self, said: dict[str, list[dict[str, Any]]], there: Sequence[tuple[float, str]], late: int = 0
    ) -> None:
        self.said, self.there, self.late = said, there, late
        self.searches = 0

    def found(self, query: dict[str, Any]) -> list[str]:
        times = query["range"]["event.created"]
        there = self.there if self.searches > 1 else self.there[self.late :]
        return [each for time, each in there if times["gte"] <= time <= times["lte"]]

    def search(self, index: str, **asked: Any) -> dict[str, Any]:
        assert asked["allow_partial_search_results"] is False
        if "aggs" not in asked:
            action = asked["query"]["bool"]["filter"][0]["term"]["event.action"]
            host = index.removeprefix("logs-llmkeep.service-")
            return {
                "hits": {
                    "hits": [
                        {"_source": each}
                        for each in self.said.get(host, [])
                        if each["event"]["action"] == action
                    ]
                }
            }
        if "ids" in asked["aggs"]:
            composite = asked["aggs"]["ids"]["composite"]
            after = composite.get("after", {"id": ""})["id"]
            rest = sorted(each for each in set(self.found(asked["query"])) if each > after)[
                : composite["size"]
            ]
            ids = {"buckets": [{"key": {"id": each}} for each in rest]}
            return {"aggregations": {"ids": ids | ({"after_key": {"id": rest[-1]}} if rest else {})}}
        self.searches += 1
        buckets = {}
        for name, query in asked["aggs"]["windows"]["filters"]["filters"].items():
            found = self.found(query)
            different = len({each[:8] for each in found})
            buckets[name] = {"doc_count": len(found), "different": {"value": different}}
        return {"aggregations": {"windows": {"buckets": buckets}}}


def count(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents of a host's counts."""
    short = "llmkeep.journal."
    return [
        {
            "event": {"action": "journal_counted", "created": line["@timestamp"]},
            "llmkeep": {
                "journal": {key.removeprefix(short): line[key] for key in line if key.startswith(short)}
            },
        }
        for line in said(entries)
    ]


TEMPLATE = {
    "index_patterns": ["logs-llmkeep.*"],
    "template": {"mappings": json.loads((ROOT / "roles/elasticsearch/files/ecs.json").read_text())},
}
ENTRIES = [entry(number, BEGIN + number) for number in range(1, 101)]
THERE = [(BEGIN + number, f"{number:08}") for number in range(1, 101)]


def checked(server: Server, monkeypatch: pytest.MonkeyPatch, *hosts: str) -> dict[str, Source]:
    monkeypatch.setattr(logs_check, "AGAIN", 0)
    now = datetime.now(UTC)
    return logs_check.check(server, list(hosts or ["llm1"]), now - timedelta(hours=1), now, timedelta())


@pytest.mark.parametrize("page", [1000, 7, 100])
def test_ids_that_elasticsearch_takes_for_one_are_no_gap_and_no_duplicate(
    monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(logs_check, "PAGE", page)
    alike = [*THERE[:-2], (BEGIN + 99, "collides1"), (BEGIN + 100, "collides2")]
    found = checked(Server({"llm1": count(ENTRIES)}, alike), monkeypatch)
    assert logs_check.code(found) == 0
    [hour] = found["llm1"].hours.values()
    assert (hour.missing, hour.duplicates, hour.indexed) == (0, 0, 100)


def test_a_document_that_is_there_twice_does_not_stand_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [gap] = checked(Server({"llm1": count(ENTRIES)}, [*THERE[1:], THERE[5]]), monkeypatch)["llm1"].gaps
    assert gap.missing == 1


def test_documents_that_come_after_their_count_are_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server({"llm1": count(ENTRIES)}, THERE, late=3)
    assert logs_check.code(checked(server, monkeypatch)) == 0
    assert server.searches == 2


WHOLE = {
    "id": "j1",
    "from": 1,
    "to": 3,
    "entries": 3,
    "first": "2026-11-27T22:00:00Z",
    "last": "2026-11-27T22:00:00Z",
}


@pytest.mark.parametrize(
    "bad",
    [
        {"journal": {"id": "j1", "from": "many"}},
        {"journal": WHOLE | {"entries": 9}},
        {"journal": WHOLE | {"last": "9999-12-31T23:59:59-20:00"}},
        "no object",
    ],
)
def test_a_count_that_is_none_is_told_of_its_host_and_the_others_are_checked(
    monkeypatch: pytest.MonkeyPatch, bad: Any
) -> None:
    document = {"event": {"action": "journal_counted", "created": "2026-11-27T22:00:00Z"}, "llmkeep": bad}
    said = {"llm1": [document, *count(ENTRIES)], "llm2": count(ENTRIES)}
    found = checked(Server(said, THERE), monkeypatch, "llm1", "llm2")
    assert [len(found[host].unread) for host in ("llm1", "llm2")] == [1, 0]
    assert [sum(hour.written for hour in found[host].hours.values()) for host in found] == [100, 100]
    assert logs_check.code(found) == logs_check.MISSING
    assert "llm1: UNREAD: one of its counts is invalid" in "\n".join(logs_check.lines(found))


def test_counters_that_are_none_are_told_and_the_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = [
        {"event": {"action": "shipper_counted", "created": "2026-11-27T22:00:00Z"}, "llmkeep": {"shipper": each}}
        for each in ({"acked": 1, "dropped": 0, "duplicates": 0}, {"acked": "x"}, {"acked": 5, "dropped": 0, "duplicates": 0})
    ]  # fmt: skip
    found = checked(Server({"llm1": [*count(ENTRIES), *counters]}, THERE), monkeypatch)
    assert len(found["llm1"].unread) == 1
    assert found["llm1"].hours["2026-11-27T22:00:00.000Z"].shipped == 4


def test_a_host_of_which_nothing_is_there_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(Server({}, []), monkeypatch)
    assert found["llm1"].silent
    assert logs_check.code(found) == logs_check.SILENT_ONLY
    assert "llm1: SILENT: it has no count" in "\n".join(logs_check.lines(found))


def test_ids_are_counted_by_the_real_server() -> None:
    with search_server() as server, Elasticsearch(f"http://127.0.0.1:{server.port}") as client:
        server.do("PUT", "/_index_template/logs", TEMPLATE)
        for stream in ("system", "edge"):
            operations: list[dict[str, Any]] = []
            for number in range(1500):
                event = {"created": BEGIN + number, "id": f"{stream}-{number}"}
                operations += [{"create": {}}, {"event": event}] * 2
            client.bulk(index=f"logs-llmkeep.{stream}-llm1", operations=operations, refresh=True)
        [(there, different)] = logs_check.documents(
            client, "llm1", [[Window("j1", 1, 2900, 2900, BEGIN, BEGIN + 1449)]]
        )
        assert (there, different) == (5800, 2900)
