"""Old files of the record are removed once a record declares it; the chain and its heads are verified from there on.

A `removed` record has the number of the last removed record, the hash of that record's line, and the peaks of the
Merkle tree over all up to it. Only the record's own writer writes one, and it counts only under a signed head. Each
head over more records proves its content: their roots follow only from these peaks and the remaining lines.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmproof.heads import Tree

MIN_DAYS = 180
ACTION = "removed"
LAST, HASH, PEAKS = "llmkeep.audit.removed.last", "llmkeep.audit.removed.hash", "llmkeep.audit.removed.peaks"


@dataclass(frozen=True)
class Start:
    """Where the record begins: after its first `size` records, which were removed. `sequence`, `at`: number and time of the
    record that declares it; 0 and empty for a record that is whole."""

    size: int = 0
    previous: str = "0" * 64
    peaks: list[bytes] = field(default_factory=list)
    sequence: int = 0
    at: str = ""

    def tree(self) -> Tree:
        """The tree over the removed records."""
        return Tree(self.size, [*self.peaks])


def declaration(tree: Tree, previous: str, reason: str) -> dict[str, object]:
    """The event that declares the records of TREE removed; PREVIOUS: the hash of the last one's line."""
    return {
        "event.kind": "event",
        "event.category": ["file"],
        "event.type": ["deletion"],
        "event.action": ACTION,
        "event.outcome": "success",
        "event.reason": reason,
        LAST: tree.size,
        HASH: previous,
        PEAKS: [peak.hex() for peak in tree.peaks],
    }


def declared(files: list[Path], signed: int) -> Start | None:
    """The last declaration among the first SIGNED records of the files; None where there is none."""
    mark = f'"event.action":"{ACTION}"'.encode()
    for path in reversed(files):
        last = None
        with path.open("rb") as file:
            for line in file:
                start = _start(line) if mark in line else None
                if start and start.sequence <= signed:
                    last = start
        if last:
            return last
    return None


def _start(line: bytes) -> Start | None:
    try:
        record: Mapping[str, object] = json.loads(line)
        size, previous, peaks = record[LAST], record[HASH], record[PEAKS]
        sequence, at = record["event.sequence"], record["@timestamp"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not (
        isinstance(size, int)
        and isinstance(sequence, int)
        and isinstance(peaks, list)
        and 0 < size < sequence
    ):
        return None
    if (
        not all(re.fullmatch(r"[0-9a-f]{64}", str(each)) for each in (previous, *peaks))
        or len(peaks) != size.bit_count()
    ):
        return None
    return Start(size, str(previous), [bytes.fromhex(peak) for peak in peaks], sequence, str(at))
