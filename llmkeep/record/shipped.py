"""`llmkeep audit shipped`: verify that Elasticsearch's copy of the hosts' audit records is what the hosts signed.

Each line came with its leaf of the record's Merkle tree (roles/filebeat/files/audit_ship.py). The heads are those
that the witness keeps on this node, so neither a host nor Elasticsearch can choose them. A line that was withheld on
its host, for a field that is not shipped, has only its leaf: this proves that it exists unchanged, but not its
content.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from llmkeep.errors import LlmkeepError
from llmkeep.logs_check import all_hits
from llmproof import retention
from llmproof.chain import named_previous, problem
from llmproof.heads import Head, HeadError, Tree, Verifier, split

REMOVED = f'"event.action":"{retention.ACTION}"'.encode()
LATE = timedelta(minutes=15)  # records under a head that is older should be there
KEPT = timedelta(days=180)  # older logs Elasticsearch may have removed, by age or for want of room


@dataclass(frozen=True)
class Line:
    """A shipped record; `whole` is None if the host withheld it."""

    sequence: int
    leaf: bytes
    whole: bytes | None


@dataclass
class Shipped:
    """`heads`: how many of the witness's heads match the copy. `first`: 0 if there is none.

    `removed`: the last record removed by declared retention. `notes`: remarks that are not faults.
    """

    first: int = 0
    last: int = 0
    records: int = 0
    withheld: int = 0
    duplicates: int = 0
    heads: int = 0
    removed: int = 0
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def line(document: dict[str, Any]) -> Line:
    """Parse a document's line. KeyError, ValueError or TypeError if it is invalid."""
    audit = document["llmkeep"]["audit"]
    whole = audit.get("record")
    return Line(
        int(document["event"]["sequence"]),
        bytes.fromhex(audit["leaf"]),
        None if whole is None else str(whole).encode(),
    )


def signed_before(heads: list[Head], moment: datetime) -> int:
    """The least number of records at that time: the size of the largest head signed until then."""
    return max(
        (head.size for head in heads if head.time and datetime.fromisoformat(head.time) < moment), default=0
    )


def removed_up_to(whole: bytes) -> int:
    """The last record that a declaration lists as removed; 0 if it lists none."""
    try:
        return int(json.loads(whole).get(retention.LAST, 0))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return 0


def verify(lines: Iterable[Line], heads: list[Head], now: datetime) -> Shipped:
    """Every line, every link and every head that the copy can prove. `lines` by sequence number."""
    copy = Shipped()
    at_size = {head.size: head for head in heads}
    tree: Tree | None = Tree()  # None once a record is missing: heads cannot be computed from there on
    previous, leaf = "", b""
    for each in lines:
        if each.sequence == copy.last and copy.records:
            if each.leaf == leaf:
                copy.duplicates += 1
            else:
                copy.findings.append(
                    f"record {each.sequence} exists twice with different content: one was forged"
                )
            continue
        if not copy.records:
            copy.first = each.sequence
            if each.sequence > 1:
                tree = None
        elif each.sequence != copy.last + 1:
            copy.findings.append(f"records {copy.last + 1} to {each.sequence - 1} are missing")
            tree, previous = None, ""
        if each.whole is None:
            copy.withheld += 1
            previous = ""
        else:
            if hashlib.sha256(b"\0" + each.whole).digest() != each.leaf:
                copy.findings.append(f"record {each.sequence} does not match its leaf: it was changed")
            elif wrong := problem(each.whole, each.sequence, previous or named_previous(each.whole)):
                copy.findings.append(f"record {each.sequence}: {wrong}")
            previous = hashlib.sha256(each.whole).hexdigest()
            if REMOVED in each.whole:
                copy.removed = max(copy.removed, removed_up_to(each.whole))
        copy.last, leaf = each.sequence, each.leaf
        copy.records += 1
        if tree is None:
            continue
        tree.add_hash(each.leaf)
        if head := at_size.get(tree.size):
            if head.root == tree.root():
                copy.heads += 1
            else:
                copy.findings.append(
                    f"the witness's head over the first {tree.size} records does not match: one of them differs from what "
                    "was signed"
                )
                tree = None
    expired = signed_before(heads, now - KEPT)
    if copy.first - 1 > max(copy.removed, expired):
        copy.findings.insert(
            0,
            f"records {max(copy.removed, expired) + 1} to {copy.first - 1} are missing, and no record declares them removed by "
            "retention",
        )
    elif copy.first - 1 > copy.removed:
        copy.notes.append(
            f"records {copy.removed + 1} to {copy.first - 1} are absent: they were signed more than {KEPT.days} days ago, "
            "so Elasticsearch may have removed them. The host has its own copy"
        )
    last = copy.last if copy.records else expired
    due = signed_before(heads, now - LATE)
    if due > last:
        copy.findings.append(
            f"records {last + 1} to {due} are missing: a head was signed over them more than 15 minutes ago"
        )
    return copy


def kept_heads(notes: bytes, verifier: str) -> list[Head]:
    """The heads in the witness's file; LlmkeepError if one is not the host's."""
    try:
        key = Verifier(verifier)
        heads = [key.open(note) for note in split(notes)[0]]
        for head in heads:
            datetime.fromisoformat(head.time or "1970-01-01")
        return heads
    except (HeadError, ValueError) as error:
        raise LlmkeepError(
            f"the witness's copy is invalid ({error}): see `llmkeep audit findings`"
        ) from error


def copied(client: Any, namespace: str, unread: list[str]) -> Iterator[Line]:
    """Elasticsearch's copy of a host's record, by sequence number; UNREAD collects invalid lines."""
    filters = [
        {"term": {"event.action": "audit_shipped"}},
        {"term": {"service.name": "llmkeep-audit-ship.service"}},
    ]
    for document in all_hits(client, namespace, filters, {"event.sequence": "long"}):
        try:
            yield line(document)
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            unread.append(f"a line of the record is invalid ({error!r}): {json.dumps(document)[:300]}")


def of_host(client: Any, host: str, notes: bytes, verifier: str) -> Shipped:
    unread: list[str] = []
    try:
        heads = kept_heads(notes, verifier)
    except LlmkeepError as error:
        return Shipped(findings=[str(error)])
    copy = verify(copied(client, host.lower().replace("-", "_"), unread), heads, datetime.now(UTC))
    copy.findings += unread
    return copy


def check(client: Any, heads_of: dict[str, tuple[bytes, str]]) -> dict[str, Shipped]:
    """The copy of each host; HEADS_OF has, by host, the witness's file of heads and the verifier key."""
    return {host: of_host(client, host, *witnessed) for host, witnessed in sorted(heads_of.items())}
