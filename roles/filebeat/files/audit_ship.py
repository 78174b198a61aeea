#!/usr/bin/python3
"""audit_ship.py FOLDER STATE: prints the audit record's lines that are new, for the journal, which is shipped.

Each with its leaf of the record's Merkle tree (SHA-256 of a zero byte and the line). A line that has a field which is not named
here, as a prompt that policy put on record, or is too long for an entry of the journal, stays on the host: its leaf is shipped,
so that signed heads can be checked all the same. `llmkeep audit shipped` verifies on the control node what Elasticsearch has.

STATE holds the number of the last record that was printed.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

MOST = 16_000  # bytes of a line; an entry of the journal has 48 KiB, and quotes are escaped
# The hash of a prompt is keyed (llmkeep.prompt.hmac); its text (llmkeep.prompt.text) is not among them.
ALLOWED = {
    "@timestamp", "error.code", "event.action", "event.category", "event.duration", "event.kind", "event.outcome",
    "event.reason", "event.sequence", "event.type", "gen_ai.request.model", "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens", "http.request.id", "http.response.status_code", "llmkeep.audit.codes",
    "llmkeep.audit.count", "llmkeep.audit.dropped_bytes", "llmkeep.audit.hash", "llmkeep.audit.phase",
    "llmkeep.audit.previous", "llmkeep.audit.removed.hash", "llmkeep.audit.removed.last", "llmkeep.audit.removed.peaks",
    "llmkeep.audit.source", "llmkeep.decision.id", "llmkeep.decision.revision", "llmkeep.decision.rule",
    "llmkeep.identity.id", "llmkeep.identity.kind", "llmkeep.prompt.hmac", "organization.id", "source.ip", "transaction.id",
    "url.path", "user.id", "user.roles",
}  # fmt: skip


def line(whole: bytes) -> tuple[int, str]:
    """Number of a record, and what is shipped of it."""
    record = json.loads(whole)
    number = int(record["event.sequence"])
    document = {
        "message": "a line of the audit record",
        "event.action": "audit_shipped",
        "event.sequence": number,
        "llmkeep.audit.leaf": hashlib.sha256(b"\0" + whole).hexdigest(),
    }
    if len(whole) <= MOST and record.keys() <= ALLOWED:
        document["llmkeep.audit.record"] = whole.decode()
    return number, json.dumps(document)


def main() -> None:
    folder, state = Path(sys.argv[1]), Path(sys.argv[2])
    last = int(state.read_text()) if state.exists() else 0
    files = sorted(folder.glob("records-*.jsonl"))
    firsts = [int(path.stem.removeprefix("records-")) for path in files]
    new = last
    for path, following in zip(files, [*firsts[1:], None], strict=True):
        if following is not None and following <= last + 1:
            continue
        with path.open("rb") as file:
            for whole in file:
                if not whole.endswith(b"\n"):
                    break  # it is being written
                number, document = line(whole.removesuffix(b"\n"))
                if number > last:
                    print(document)
                    new = number
    sys.stdout.flush()
    if new > last:
        fresh = state.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(str(new))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(state)


if __name__ == "__main__":
    main()
