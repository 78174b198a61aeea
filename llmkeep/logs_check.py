"""`llmkeep logs check`: what each host wrote, shipped and what Elasticsearch has of it, by hour; gaps and duplicates by name.

On each host in `[logs]` a timer counts the journal in windows of about 100 entries (roles/filebeat/files/journal_count.py). The
lines are shipped as everything else is. A document has the time at which the journal took its entry, to the millisecond, and an
id that it keeps when it is sent again; so a window's documents are those of its time.

A source is a data stream's last part, not a name in a document: a host's key writes its own streams alone.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from llmkeep.errors import LlmkeepError, printable

PAGE = 1000  # statements of one search
RANGES = 500  # windows of one aggregation
SILENT = timedelta(minutes=15)  # three runs of the timer
MISSING, SILENT_ONLY = 3, 4  # exit codes
HOUR = 3_600_000


@dataclass(frozen=True)
class Window:
    """Entries `first` to `last` of journal `journal`: `entries` documents, taken from `begins` to `ends` (ms since 1970).

    `counted`: False where no host counted them, and their number is known by those around them.
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
    """What was found of one host. `heard`: time of its last count, empty if there is none."""

    heard: str = ""
    silent: bool = False
    hours: dict[str, Hour] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
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


def window(document: dict[str, Any]) -> Window:
    """A host's count. ValueError, KeyError or TypeError for what is none."""
    said = document["llmkeep"]["journal"]
    return Window(
        str(said["id"]),
        int(said["from"]),
        int(said["to"]),
        int(said["entries"]),
        milliseconds(said["first"]),
        milliseconds(said["last"]),
    )


def by_number(windows: Iterable[Window]) -> list[Window]:
    """Windows by journal, in the order in which those appear, and number: their times are a clock's, which may have gone back."""
    journals: dict[str, list[Window]] = {}
    for each in windows:
        journals.setdefault(each.journal, []).append(each)
    return [
        each
        for of_one in journals.values()
        for each in sorted(of_one, key=lambda each: (each.first, each.last))
    ]


def continued(windows: Iterable[Window], notes: list[str]) -> Iterator[Window]:
    """Windows in the order of their numbers, with those between that no host counted; NOTES gets what is unusual."""
    before: Window | None = None
    for now in windows:
        if before and now.journal != before.journal:
            notes.append(
                f"the journal began anew at {iso(now.begins)} (the host was set up anew, or its journal was removed): what the "
                f"one before had after sequence number {before.last} is not known"
            )
        elif before and now.first <= before.last:
            if now.last <= before.last:
                continue  # a count that was repeated after a kill
            notes.append(
                f"sequence numbers {now.first} to {before.last} were counted twice: what is missing is at most as many"
            )
        elif before and now.first > before.last + 1:
            number = now.first - before.last - 1
            notes.append(
                f"sequence numbers {before.last + 1} to {now.first - 1} left the journal before they were counted: it was "
                "rotated or damaged, or the counts themselves were lost"
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
                f"the clock went back by {(before.ends - now.begins) / 1000:.0f} s at sequence number {now.first}: windows "
                "that overlap are judged together"
            )
        yield now
        before = now


def together(windows: Iterable[Window]) -> list[list[Window]]:
    """Windows by time; those that overlap are in one group, since a document does not tell whose it is."""
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
    """Compare groups of windows with their documents, in all and different ones, and put the result into SOURCE."""
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
                    "Elasticsearch lacks them, and the host has them in its journal"
                    if all(each.counted for each in lost)
                    else "they left the journal before they were counted, and Elasticsearch lacks them",
                )
            )


def grown(source: Source, counters: Iterable[tuple[int, dict[str, int]]]) -> None:
    """Add what Filebeat's counters grew by; they begin at 0 with each start of it, so a kill loses their last minutes."""
    before: dict[str, int] = {}
    for taken, now in counters:
        if before:
            known = before if now["acked"] >= before["acked"] else dict.fromkeys(now, 0)
            hour = source.hour(taken)
            hour.shipped += now["acked"] - known["acked"]
            hour.refused_twice += now["duplicates"] - known["duplicates"]
            hour.dropped += now["dropped"] - known["dropped"]
        before = now


def statements(
    client: Any, namespace: str, action: str, since: datetime, until: datetime
) -> Iterator[dict[str, Any]]:
    """A host's own counts in the order in which its journal took them."""
    after: list[Any] | None = None
    while True:
        hits = client.search(
            index=f"logs-llmkeep.service-{namespace}",
            ignore_unavailable=True,
            allow_partial_search_results=False,
            query={
                "bool": {
                    "filter": [
                        {"term": {"event.action": action}},
                        {"prefix": {"service.name": "llmkeep-journal-count."}},
                        {"range": {"event.created": {"gte": since.isoformat(), "lt": until.isoformat()}}},
                    ]
                }
            },
            sort=[
                {"event.created": {"order": "asc", "unmapped_type": "date"}},
                {"llmkeep.journal.from": {"order": "asc", "unmapped_type": "long"}},
                {"event.id": {"order": "asc", "unmapped_type": "keyword"}},
            ],
            size=PAGE,
            search_after=after,
        )["hits"]["hits"]
        yield from (hit["_source"] for hit in hits)
        if len(hits) < PAGE:
            return
        after = hits[-1]["sort"]


def documents(client: Any, namespace: str, groups: list[list[Window]]) -> list[tuple[int, int]]:
    """For each group, documents that were taken in its time, and how many different ones."""
    found: list[tuple[int, int]] = []
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
            index=f"logs-llmkeep.*-{namespace},-logs-llmkeep.audit-*",
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
        for number in asked:
            bucket = buckets.get(number, {"doc_count": 0, "different": {"value": 0}})
            found.append((bucket["doc_count"], bucket["different"]["value"]))
    return found


def check(
    client: Any, namespaces: list[str], since: datetime, now: datetime, settle: timedelta
) -> dict[str, Source]:
    """Each source as it is. Counts that are younger than SETTLE are left out: their documents may be under way."""
    sources = {}
    for namespace in namespaces:
        source = sources[namespace] = Source()
        windows, counters = [], []
        for document in statements(client, namespace, "journal_counted", since, now - settle):
            try:
                windows.append(window(document))
            except (KeyError, ValueError, TypeError) as error:
                raise LlmkeepError(
                    f"a count of {namespace} is none ({error!r}): {printable(json.dumps(document)[:300])}. Look at that host"
                ) from error
            source.heard = document["event"]["created"]
        for document in statements(client, namespace, "shipper_counted", since, now - settle):
            counters.append((milliseconds(document["event"]["created"]), document["llmkeep"]["shipper"]))
        source.silent = not source.heard or now - settle - datetime.fromisoformat(source.heard) > SILENT
        groups = together(continued(by_number(windows), source.notes))
        judge(source, groups, documents(client, namespace, groups))
        grown(source, counters)
        source.hours = dict(sorted(source.hours.items()))
    return sources


def code(sources: dict[str, Source]) -> int:
    """The exit code: 0, MISSING, or SILENT_ONLY."""
    if any(source.gaps for source in sources.values()):
        return MISSING
    return SILENT_ONLY if any(source.silent for source in sources.values()) else 0


def lines(sources: dict[str, Source]) -> Iterator[str]:
    """The result for a person."""
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
        yield from (f"{name}: {note}" for note in source.notes)
        if source.silent:
            yield (
                f"{name}: SILENT: "
                + (f"its last count is of {source.heard}" if source.heard else "no count of it is there")
                + ": the host, its Filebeat or llmkeep-journal-count.timer there stands still"
            )


def recorded(sources: dict[str, Source], now: datetime) -> bytes:
    """The result for a machine, as one document."""
    return json.dumps(
        {
            "time": now.isoformat(timespec="seconds"),
            "sources": {name: asdict(source) for name, source in sources.items()},
        },
        indent=1,
    ).encode()
