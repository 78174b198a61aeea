"""The documents that Elasticsearch gets for a rating: without text and subject."""

import hashlib
import json
from datetime import datetime

from llmcore.ratings import FIELD, TENANT, TIME, TRANSACTION, Record

LATEST, HISTORY = "llmkeep-ratings", "llmkeep-ratings-history"  # indices
GIVEN = (
    TIME,
    TRANSACTION,
    "event.created",
    TENANT,
    *(f"{FIELD}{name}" for name in ("thumb", "stars", "reason")),
)
OF_ANSWER = ("event.action", "llm.model", "llm.revision")


def mark(record: Record) -> Record:
    """The key of a rating's documents: exchange, milliseconds since the epoch, and a digest of the rating.

    Raises KeyError or ValueError if the record is not a rating.
    """
    fields = {name: record[name] for name in GIVEN if name in record}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    milliseconds = round(datetime.fromisoformat(record[TIME]).timestamp() * 1000)
    return {TRANSACTION: record[TRANSACTION], "version": milliseconds, "digest": digest}


def operations(marked: Record, document: Record | None) -> list[Record]:
    """Bulk operations that put a document into both indices, or delete it from both.

    Sending them again changes nothing. An older rating never replaces or deletes a newer one of the same exchange.
    """
    identifier = marked[TRANSACTION]
    latest: Record = {
        "_op_type": "delete" if document is None else "index",
        "_index": LATEST,
        "_id": identifier,
        "version": marked["version"],
        "version_type": "external_gte",
    }
    history: Record = {
        "_op_type": "delete" if document is None else "create",
        "_index": HISTORY,
        "_id": f"{identifier}-{marked['version']}-{marked['digest']}",
    }
    if document is not None:
        latest["_source"] = history["_source"] = document
    return [history, latest]


def corrected(record: Record) -> bool:
    """Whether a rating came with a correction, whose text is kept only for tenants that consent."""
    return f"{FIELD}corrected" in record or f"{FIELD}correction" in record


def document(record: Record, answer: Record) -> Record:
    """The document of a rating; `answer`: the journal's record of its answer, if any."""
    fields = {name: record[name] for name in GIVEN if name in record}
    fields |= {name: answer[name] for name in OF_ANSWER if name in answer}
    return fields | {f"{FIELD}corrected": corrected(record)}
