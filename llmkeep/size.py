"""`llmkeep size`: the daily size of logs at a load, and the volumes for their retention.

The size of documents was measured (sizes.json, which names the command); their number follows from the load.

Exit codes: 0 the inventory's budgets suffice; 1 they do not, or the inventory cannot be read.
"""

import argparse
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llmkeep import source_tree
from llmkeep.errors import LlmkeepError
from llmkeep.playbooks import inventory_path, listed

DAY = 86400
MIB, GIB = 1 << 20, 1 << 30
FILLED = 0.85  # of a volume; beyond it Elasticsearch makes no replicas (low watermark)
INDEX_DAYS = (
    30  # after which elasticsearch-keep begins a new index, so the oldest one outlives keep_days by as much
)
MOST_SHARDS = 1000  # of a node, cluster.max_shards_per_node
INDEX_BYTES = 10 * GIB  # likewise
# How many documents of each kind one request makes, of the audit record its intent and outcome; logins and other lines are given
# a host and day.
OF_A_REQUEST = {"llmkeep.service": 1, "llmkeep.service/audit": 2, "llmkeep.edge": 1}
COUNTED = (
    1 / 100
)  # of all lines, which hosts count (journal_count.py) in lines of about the size of a gateway's
AUDIT_BYTES = (
    2 * 1032
)  # of a request, its intent and outcome; 65,000 records are a file of 64 MiB (docs/develop/figures.md)
SETTINGS = (
    "elasticsearch_keep_days",
    "elasticsearch_data_gb",
    "elasticsearch_snapshot_gb",
    "filebeat_queue_mb",
)


@dataclass(frozen=True)
class Load:
    """Requests per second, averaged over a day, and lines per day of each of HOSTS."""

    requests: float
    hosts: int
    system_lines: int
    logins: int

    @property
    def documents(self) -> dict[str, float]:
        """Documents per day by kind: a stream, or STREAM/PART."""
        per_request = {kind: self.requests * DAY * number for kind, number in OF_A_REQUEST.items()}
        counts = {
            **per_request,
            "llmkeep.auth": float(self.hosts * self.logins),
            "llmkeep.system": float(self.hosts * self.system_lines),
        }
        counts["llmkeep.service"] += sum(counts.values()) * COUNTED
        return counts


def measured() -> dict[str, Any]:
    """Size in bytes of a document of each kind."""
    sizes: dict[str, Any] = json.loads(resources.files("llmkeep").joinpath("sizes.json").read_text())
    return sizes


def prediction(load: Load, settings: dict[str, int], sizes: dict[str, Any]) -> dict[str, Any]:
    """All printed figures: bytes, days and hours."""
    documents = load.documents
    bytes_of = {stream: number * sizes["bytes_per_document"][stream] for stream, number in documents.items()}
    daily = sum(bytes_of.values())
    days = settings["elasticsearch_keep_days"] + INDEX_DAYS
    journal = sum(number * sizes["journal_bytes_per_line"][stream] for stream, number in documents.items())
    queued = sum(number * sizes["queue_bytes_per_document"][stream] for stream, number in documents.items())
    busiest = queued - (load.hosts - 1) / load.hosts * sum(
        documents[stream] * sizes["queue_bytes_per_document"][stream]
        for stream in ("llmkeep.auth", "llmkeep.system")
    )
    data = settings["elasticsearch_data_gb"] * GIB
    snapshots = daily * days * sizes["snapshot_share"]
    of_stream: dict[str, float] = {}
    for kind, number in bytes_of.items():
        stream = kind.partition("/")[0]
        of_stream[stream] = of_stream.get(stream, 0) + number
    return {
        "streams": {
            stream: {"documents": round(number), "bytes": round(bytes_of[stream])}
            for stream, number in documents.items()
        },
        "bytes_a_day": round(daily),
        "journal_bytes_a_day": round(journal),
        "audit_bytes_a_day": round(load.requests * DAY * AUDIT_BYTES),
        "kept_bytes": round(daily * days),
        "data_volume_bytes": round(daily * days / FILLED),
        "snapshot_bytes": round(snapshots),
        "snapshot_volume_bytes": round(snapshots / FILLED),
        "days_until_data_gb": math.floor(data / daily) if daily else None,
        # One host that answers all requests, whose queue fills first.
        "queue_hours": round(settings["filebeat_queue_mb"] * MIB / busiest * 24, 1) if busiest else None,
        # An index has one.
        "shards": sum(
            load.hosts * math.ceil(days * max(1 / INDEX_DAYS, number / load.hosts / INDEX_BYTES))
            for number in of_stream.values()
        ),
    }


def shortcomings(needs: dict[str, Any], settings: dict[str, int]) -> list[str]:
    """Settings that do not suffice for this load, and what to do."""
    faults = []
    for name, need in (
        ("elasticsearch_data_gb", "kept_bytes"),
        ("elasticsearch_snapshot_gb", "snapshot_bytes"),
    ):
        if needs[need] > settings[name] * GIB:
            faults.append(
                f"{name} is {settings[name]}, but {math.ceil(needs[need] / GIB)} are needed: enlarge it and its volume"
            )
    if needs["shards"] > MOST_SHARDS:
        faults.append(
            f"there would be {needs['shards']} shards, but a node of Elasticsearch allows {MOST_SHARDS}: ship the logs of "
            "fewer hosts, or raise cluster.max_shards_per_node and the heap"
        )
    return faults


def settings_of(inventories: list[Path], root: Path) -> tuple[dict[str, int], int]:
    """The roles' variables of the host in `search`, and the number of hosts in `logs`."""
    groups = listed(inventories, root)
    search, logs = (groups.get(group, {}).get("hosts", []) for group in ("search", "logs"))
    if len(search) != 1 or not logs:
        raise LlmkeepError(
            f"the group search has {len(search)} hosts and the group logs {len(logs)}: put one host in search, and the "
            "hosts whose logs are kept in logs"
        )
    declared = groups["_meta"]["hostvars"].get(search[0], {})
    queues = [groups["_meta"]["hostvars"].get(host, {}).get("filebeat_queue_mb") for host in logs]
    defaults: dict[str, Any] = {}
    for role in ("elasticsearch", "filebeat"):
        defaults |= yaml.safe_load((root / "roles" / role / "defaults/main.yml").read_text())
    settings = {name: declared.get(name, defaults[name]) for name in SETTINGS}
    settings["filebeat_queue_mb"] = min(
        defaults["filebeat_queue_mb"] if queue is None else queue for queue in queues
    )
    for name, value in settings.items():
        if not isinstance(value, int):
            raise LlmkeepError(f"{name} is {value!r}: write a number")
    return settings, len(logs)


def report_lines(needs: dict[str, Any], settings: dict[str, int], load: Load) -> list[str]:
    """Lines for a person."""

    def size(number: float) -> str:
        return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / MIB:,.1f} MiB"

    lines = [f"at {load.requests:g} requests/s and {load.hosts} hosts, a day:"]
    lines += [
        f"  {stream:22} {row['documents']:>12,} documents {size(row['bytes']):>12}"
        for stream, row in needs["streams"].items()
    ]
    days, queue = settings["elasticsearch_keep_days"], settings["filebeat_queue_mb"]
    lines.append(
        f"  together {size(needs['bytes_a_day'])}; in the journals {size(needs['journal_bytes_a_day'])}"
    )
    lines.append(f"  audit records of the hosts that serve {size(needs['audit_bytes_a_day'])}")
    lines.append(
        f"kept for {days} days, and {INDEX_DAYS} of the oldest index: {size(needs['kept_bytes'])} in "
        f"{needs['shards']} shards; a volume of {size(needs['data_volume_bytes'])}"
    )
    lines.append(
        f"snapshots: {size(needs['snapshot_bytes'])}; a volume of {size(needs['snapshot_volume_bytes'])}"
    )
    lines.append(
        f"elasticsearch_data_gb {settings['elasticsearch_data_gb']} is used up in {needs['days_until_data_gb']} days"
    )
    lines.append(
        f"the queue of a host that answers all requests ({queue} MiB) is full {needs['queue_hours']} hours after "
        "Elasticsearch goes away; then its journal has to hold"
    )
    return lines


def _size(arguments: argparse.Namespace) -> int:
    root = source_tree.located()
    settings, hosts = settings_of([inventory_path(place, root) for place in arguments.inventory], root)
    load = Load(arguments.requests, hosts, arguments.system_lines, arguments.logins)
    needs = prediction(load, settings, measured())
    lacking = shortcomings(needs, settings)
    if arguments.json:
        print(json.dumps({"settings": settings, "hosts": hosts, **needs, "shortcomings": lacking}, indent=2))
    else:
        print("\n".join([*report_lines(needs, settings, load), *(f"- {line}" for line in lacking)]))
    return int(bool(lacking))


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep size`."""
    parser = subparsers.add_parser(
        "size",
        help="compute the daily size of logs at a load, and the volumes for it",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    parser.add_argument(
        "--requests",
        type=float,
        required=True,
        metavar="PER_SECOND",
        help="requests per second, averaged over a day",
    )
    parser.add_argument(
        "--system-lines",
        type=int,
        default=20_000,
        metavar="N",
        help="other log lines per host and day (default %(default)s)",
    )
    parser.add_argument(
        "--logins",
        type=int,
        default=1000,
        metavar="N",
        help="log lines of sshd and sudo per host and day (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=_size)
