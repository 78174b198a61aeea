"""`llmkeep logs check`: entries written, shipped and indexed per host and hour, with gaps and duplicates.

On each host in `[logs]` a timer counts the journal in windows of about 100 entries
(roles/filebeat/files/journal_count.py). The lines are shipped as everything else is. A document has the time of its
journal entry, to the millisecond, and an id that stays the same when it is sent again, so a window's documents can be
selected by time. A source is the last part of a data stream's name, not a name in a document: a host's key can write
only its own streams.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

PAGE = 1000  # documents of one search
RANGES = 500  # windows of one aggregation
# Documents up to which `cardinality` is exact if it says that all are different. It compares 25 bits of each id's hash, so it may
# take two for one; what it adds for that, in all, rounds to 0 here.
ROUNDED = 5000
AGAIN = 5.0  # seconds until missing ones are asked for again: a count may become visible before its documents
SILENT = timedelta(minutes=15)  # three runs of the timer
MISSING, SILENT_ONLY = 3, 4  # exit codes
HOUR = 3_600_000


@dataclass(frozen=True)
class Window:
    """Entries `first` to `last` of journal `journal`: `entries` documents, taken from `begins` to `ends` (ms since 1970).

    `counted`: False if no host counted them, and their number follows from the windows around them.
    """

    journal: str
    first: int
    last: int
    entries: int
    begins: int
    ends: int
    counted: bool = True


@dataclass
class Gap:
    """`missing` documents of entries `first` to `last`, of the hour that begins at `hour`."""

    hour: str
    journal: str
    first: int
    last: int
    missing: int
    why: str


@dataclass
class Hour:
    written: int = 0
    shipped: int = 0
    indexed: int = 0
    missing: int = 0
    duplicates: int = 0  # documents that are there twice
    refused_twice: int = 0  # sent again and known: Filebeat counted them
    dropped: int = 0  # refused for good: Filebeat counted them


@dataclass
class Source:
    """Result for one host. `heard`: time of its last count, empty if there is none."""

    heard: str = ""
    silent: bool = False
    hours: dict[str, Hour] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # its counts that are none
    notes: list[str] = field(default_factory=list)

    def hour(self, milliseconds: int) -> Hour:
        return self.hours.setdefault(iso(milliseconds // HOUR * HOUR), Hour())


def iso(milliseconds: int) -> str:
    return (
        datetime.fromtimestamp(milliseconds / 1000, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def milliseconds(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


NONE = (LookupError, ValueError, TypeError, ArithmeticError)  # what reading a malformed document raises


def window(document: dict[str, Any]) -> Window:
    """Parse a host's count. Raises one of NONE if it is invalid."""
    count = document["llmkeep"]["journal"]
    window = Window(
        str(count["id"]),
        int(count["from"]),
        int(count["to"]),
        int(count["entries"]),
        milliseconds(count["first"]),
        milliseconds(count["last"]),
    )
    if not (0 < window.entries <= window.last - window.first + 1 and 0 <= window.begins <= window.ends):
        raise ValueError("its numbers contradict each other")
    iso(window.ends)  # a year that is none
    return window


def counters(document: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Parse the time and Filebeat's counters. Raises one of NONE if they are invalid."""
    count = document["llmkeep"]["shipper"]
    return milliseconds(document["event"]["created"]), {
        name: int(count[name]) for name in ("acked", "dropped", "duplicates")
    }


def by_number(windows: Iterable[Window]) -> list[Window]:
    """Windows sorted by journal, in order of appearance, and number: their times may be wrong if the clock was set back."""
    journals: dict[str, list[Window]] = {}
    for each in windows:
        journals.setdefault(each.journal, []).append(each)
    return [
        each
        for of_one in journals.values()
        for each in sorted(of_one, key=lambda each: (each.first, each.last))
    ]


def continued(windows: Iterable[Window], notes: list[str]) -> Iterator[Window]:
    """Windows in the order of their numbers, with uncounted windows in between; NOTES collects anything unusual."""
    before: Window | None = None
    for now in windows:
        if before and now.journal != before.journal:
            notes.append(
                f"a new journal began at {iso(now.begins)} (the host was reinstalled, or its journal was removed): entries "
                f"of the previous journal after sequence number {before.last} are unknown"
            )
        elif before and now.first <= before.last:
            if now.last <= before.last:
                continue  # a count that was repeated after a kill
            notes.append(
                f"sequence numbers {now.first} to {before.last} were counted twice: at most that many entries are missing"
            )
        elif before and now.first > before.last + 1:
            number = now.first - before.last - 1
            notes.append(
                f"sequence numbers {before.last + 1} to {now.first - 1} left the journal before they were counted: the "
                "journal was rotated or damaged, or the counts themselves were lost"
            )
            yield Window(
                now.journal,
                before.last + 1,
                now.first - 1,
                number,
                min(before.ends + 1, now.begins),
                max(now.begins - 1, before.ends),
                counted=False,
            )
        if before and now.begins < before.ends - 1000:
            notes.append(
                f"the clock went back by {(before.ends - now.begins) / 1000:.0f} s at sequence number {now.first}: "
                "overlapping windows are judged together"
            )
        yield now
        before = now


def together(windows: Iterable[Window]) -> list[list[Window]]:
    """Windows by time, with overlapping ones in one group, since a document does not show its window."""
    groups: list[list[Window]] = []
    end = -1
    for each in sorted(windows, key=lambda each: (each.begins, each.ends)):
        if groups and each.begins <= end:
            groups[-1].append(each)
        else:
            groups.append([each])
        end = max(end, each.ends)
    return groups


def judge(source: Source, groups: list[list[Window]], counts: list[tuple[int, int]]) -> None:
    """Compare groups of windows with their documents, total and distinct, and put the result into SOURCE."""
    for group, (there, different) in zip(groups, counts, strict=True):
        hour = source.hour(group[0].begins)
        written = sum(each.entries for each in group)
        missing = max(0, written - different)
        hour.written += written
        hour.indexed += different
        hour.missing += missing
        hour.duplicates += there - different
        if missing:
            lost = [each for each in group if not each.counted and each.entries == missing] or group
            source.gaps.append(
                Gap(
                    iso(group[0].begins // HOUR * HOUR),
                    lost[0].journal,
                    min(each.first for each in lost),
                    max(each.last for each in lost),
                    missing,
                    "Elasticsearch lacks them, but the host has them in its journal"
                    if all(each.counted for each in lost)
                    else "they left the journal before they were counted, and Elasticsearch lacks them",
                )
            )


def grown(source: Source, counted: Iterable[tuple[int, dict[str, int]]]) -> None:
    """Add the growth of Filebeat's counters; they restart at 0 with Filebeat, so killing it loses their last minutes."""
    before: dict[str, int] = {}
    for taken, now in counted:
        if before:
            anew = any(now[name] < before[name] for name in now)
            known = dict.fromkeys(now, 0) if anew else before
            hour = source.hour(taken)
            hour.shipped += now["acked"] - known["acked"]
            hour.refused_twice += now["duplicates"] - known["duplicates"]
            hour.dropped += now["dropped"] - known["dropped"]
        before = now


def all_hits(
    client: Any, namespace: str, filters: list[dict[str, Any]], order: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """All documents of a host's services that match FILTERS; ORDER: sort fields with their types, before the id."""
    after: list[Any] | None = None
    while True:
        hits = client.search(
            index=f"logs-llmkeep.service-{namespace}",
            ignore_unavailable=True,
            allow_partial_search_results=False,
            query={"bool": {"filter": filters}},
            sort=[
                {field: {"order": "asc", "unmapped_type": kind}}
                for field, kind in {**order, "event.id": "keyword"}.items()
            ],
            size=PAGE,
            search_after=after,
        )["hits"]["hits"]
        yield from (hit["_source"] for hit in hits)
        if len(hits) < PAGE:
            return
        after = hits[-1]["sort"]


def statements(
    client: Any, namespace: str, action: str, since: datetime, until: datetime
) -> Iterator[dict[str, Any]]:
    """A host's own counts in the order of its journal."""
    return all_hits(
        client,
        namespace,
        [
            {"term": {"event.action": action}},
            {"prefix": {"service.name": "llmkeep-journal-count."}},
            {"range": {"event.created": {"gte": since.isoformat(), "lt": until.isoformat()}}},
        ],
        {"event.created": "date", "llmkeep.journal.from": "long"},
    )


def different(client: Any, index: str, query: dict[str, Any]) -> int:
    """The exact number of distinct ids of the documents."""
    number = 0
    after: dict[str, Any] = {}
    while True:
        ids = client.search(
            index=index,
            allow_partial_search_results=False,
            size=0,
            query=query,
            aggs={
                "ids": {
                    "composite": {"size": PAGE, "sources": [{"id": {"terms": {"field": "event.id"}}}]} | after
                }
            },
        )["aggregations"]["ids"]
        number += len(ids["buckets"])
        if len(ids["buckets"]) < PAGE:
            return number
        after = {"after": ids["after_key"]}


def documents(client: Any, namespace: str, groups: list[list[Window]]) -> list[tuple[int, int]]:
    """For each group, the number of documents in its period, and the number of distinct ones."""
    index = f"logs-llmkeep.*-{namespace}"
    counts: list[tuple[int, int]] = []
    for start in range(0, len(groups), RANGES):
        asked = {
            str(number): {
                "range": {
                    "event.created": {
                        "gte": min(each.begins for each in group),
                        "lte": max(each.ends for each in group),
                        "format": "epoch_millis",
                    }
                }
            }
            for number, group in enumerate(groups[start : start + RANGES])
        }
        answer = client.search(
            index=index,
            allow_partial_search_results=False,
            size=0,
            aggs={
                "windows": {
                    "filters": {"filters": asked},
                    "aggs": {
                        "different": {"cardinality": {"field": "event.id", "precision_threshold": 40000}}
                    },
                }
            },
        )
        buckets = answer["aggregations"]["windows"]["buckets"] if "aggregations" in answer else {}
        for number, query in asked.items():
            bucket = buckets.get(number, {"doc_count": 0, "different": {"value": 0}})
            there = bucket["doc_count"]
            certain = bucket["different"]["value"] == there <= ROUNDED
            counts.append((there, there if certain else different(client, index, query)))
    return counts


def lacking(group: list[Window], count: tuple[int, int]) -> bool:
    return count[1] < sum(each.entries for each in group)


def read(client: Any, namespace: str, since: datetime, until: datetime) -> tuple[Source, list[Window]]:
    """A host's own counts: a source without gaps, and its windows."""
    source = Source()
    windows, counted = [], []
    for action in ("journal_counted", "shipper_counted"):
        for document in statements(client, namespace, action, since, until):
            try:
                if action == "journal_counted":
                    windows.append(window(document))
                    source.heard = iso(milliseconds(document["event"]["created"]))
                else:
                    counted.append(counters(document))
            except NONE as error:
                source.unread.append(f"{error!r}: {json.dumps(document)[:300]}")
    source.silent = not source.heard or until - datetime.fromisoformat(source.heard) > SILENT
    grown(source, counted)
    return source, windows


def check(
    client: Any, namespaces: list[str], since: datetime, now: datetime, settle: timedelta
) -> dict[str, Source]:
    """The state of each source. Counts newer than SETTLE are left out: their documents may be in transit."""
    sources: dict[str, Source] = {}
    groups: dict[str, list[list[Window]]] = {}
    counts: dict[str, list[tuple[int, int]]] = {}
    for namespace in namespaces:
        sources[namespace], windows = read(client, namespace, since, now - settle)
        groups[namespace] = together(continued(by_number(windows), sources[namespace].notes))
        counts[namespace] = documents(client, namespace, groups[namespace])
    late = {
        namespace: gaps
        for namespace in namespaces
        if (
            gaps := [
                number
                for number, each in enumerate(zip(groups[namespace], counts[namespace], strict=True))
                if lacking(*each)
            ]
        )
    }
    if late:
        time.sleep(AGAIN)
    for namespace, numbers in late.items():
        anew = documents(client, namespace, [groups[namespace][number] for number in numbers])
        for number, count in zip(numbers, anew, strict=True):
            counts[namespace][number] = count
    for namespace, source in sources.items():
        judge(source, groups[namespace], counts[namespace])
        source.hours = dict(sorted(source.hours.items()))
    return sources


def code(sources: dict[str, Source]) -> int:
    """The exit code: 0, MISSING, or SILENT_ONLY."""
    if any(source.gaps or source.unread for source in sources.values()):
        return MISSING
    return SILENT_ONLY if any(source.silent for source in sources.values()) else 0


def lines(sources: dict[str, Source]) -> Iterator[str]:
    """The result as lines for a person."""
    for name, source in sources.items():
        for hour, each in source.hours.items():
            yield (
                f"{name} {hour[:13]}: {each.written} written, {each.shipped} shipped, {each.indexed} indexed, "
                f"{each.missing} missing, {each.duplicates} twice, {each.refused_twice} sent again, {each.dropped} refused"
            )
        for gap in source.gaps:
            yield (
                f"{name} {gap.hour[:13]}: GAP: {gap.missing} of sequence numbers {gap.first} to {gap.last}: {gap.why}"
            )
        yield from (
            f"{name}: UNREAD: one of its counts is invalid ({each}): examine that host"
            for each in source.unread
        )
        yield from (f"{name}: {note}" for note in source.notes)
        if source.silent:
            yield (
                f"{name}: SILENT: "
                + (f"its last count was at {source.heard}" if source.heard else "it has no count")
                + ": the host, its Filebeat or its llmkeep-journal-count.timer has stopped"
            )


def recorded(sources: dict[str, Source], now: datetime) -> bytes:
    """The result as one JSON document."""
    return json.dumps(
        {
            "time": now.isoformat(timespec="seconds"),
            "sources": {name: asdict(source) for name, source in sources.items()},
        },
        indent=1,
    ).encode()
