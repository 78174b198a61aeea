"""Sends the journal's ratings to Elasticsearch, and deletes those that left the journal.

The journal is the spool. The position in each file is written after Elasticsearch has acknowledged it: a process killed in
between sends records again, which changes nothing there.
"""

import logging
import os
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmcore.files import flush, size, write_aside
from llmcore.ratings import ANSWERED, RATED, TRANSACTION, Record, files, parsed, read
from llmserve.feedback.documents import OF_ANSWER, document, mark, operations
from llmserve.feedback.journal import HOUR, SHIPPING, UNINDEXED, locked, positions, put_positions

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

log = logging.getLogger("llmserve.feedback.ship")
KEY = "elasticsearch.ratings"  # credential: ID:SECRET, as role filebeat seals it
KEY_ID = "key"  # file beside the positions: of the key by which they were reached
BATCH_BYTES = 256 * 1024  # of the journal, for each request
BACKOFF_SECONDS = 1.0  # doubles; what is refused for lack of room three times waits for the next run
AGAIN = (429, 503)


class AwayError(Exception):
    """Elasticsearch cannot be reached, has no room, or refuses the key; the message says which, and what to do."""


@dataclass
class Shipped:
    """The result of a run: ratings sent, ratings deleted from the index, and documents that Elasticsearch rejected
    permanently."""

    sent: int = 0
    removed: int = 0
    refused: int = 0


def read_key() -> tuple[str, str]:
    """ID and secret of this unit's key; raises OSError."""
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / KEY
    identifier, _, secret = path.read_text("ascii").partition(":")
    return identifier, secret


@contextmanager
def connected(url: str, pki: Path) -> "Iterator[Elasticsearch]":
    """The official client, with this host's certificate and this unit's key; raises AwayError."""
    # Here, since it takes longer to import than all else takes that a run without news does.
    from elasticsearch import Elasticsearch

    try:
        key = read_key()
        context = ssl.create_default_context(cafile=str(pki / "root.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(pki / "host.pem", pki / "host.key")
    except OSError as error:
        raise AwayError(
            f"{error.filename or pki} cannot be read ({error.strerror}): run site.yml for this host with the tag filebeat"
        ) from error
    logging.getLogger("elastic_transport").setLevel(logging.WARNING)  # else a line for each request
    with Elasticsearch(url, api_key=key, ssl_context=context, request_timeout=10, max_retries=1) as client:
        yield client


def send(client: "Elasticsearch", actions: Iterable[Record], shipped: Shipped) -> None:
    """Send bulk operations; raises AwayError unless each was acknowledged, or rejected permanently, which is logged and
    counted."""
    from elasticsearch import ApiError, TransportError
    from elasticsearch.helpers import streaming_bulk

    first = ""
    before = shipped.refused
    try:
        for success, item in streaming_bulk(
            client,
            actions,
            raise_on_error=False,
            max_retries=3,
            initial_backoff=BACKOFF_SECONDS,
            retry_on_status=AGAIN,
        ):
            [(verb, result)] = item.items()
            status = result["status"]
            # 409: it is there, or a newer rating is. 404: what was to be deleted is not there.
            if success or status == 409 or (verb, status) == ("delete", 404):
                continue
            # Of its error only the kind: a reason may cite what was sent.
            why = f"{verb} of {result['_id']} in {result['_index']}: {status} {result.get('error', {}).get('type')}"
            if status in AGAIN or status in (401, 403, 404):  # no room, no permission, no index
                raise AwayError(
                    f"Elasticsearch refuses {why}; everything that was not acknowledged will be sent again"
                )
            shipped.refused += 1
            first = first or why
    except (ApiError, TransportError) as error:
        raise AwayError(
            f"Elasticsearch did not accept ratings ({str(error)[:300]}); they stay in the journal and will be sent again. See "
            "elasticsearch.service on the search host"
        ) from error
    if first:
        log.error(
            "documents were rejected and will not be sent again",
            extra={"fields": {"documents": shipped.refused - before, "first": first}},
        )


def answers(folder: Path, records: list[Record]) -> dict[str, Record]:
    """The journal's records of the rated answers, with their models; it contains those of tenants that consent."""
    transactions = {record[TRANSACTION] for record in records}
    hours = set()
    for record in records:
        issued = datetime.fromisoformat(record["event.created"]).timestamp()
        # An answer is written when it ends, for which it has minutes.
        hours |= {time.strftime(HOUR, time.gmtime(issued + more)) for more in (0, 3600)}
    by_transaction: dict[str, Record] = {}
    for path in (folder / f"{ANSWERED}-{hour}.jsonl" for hour in hours):
        for record in read(path):
            if record.get(TRANSACTION) in transactions:
                by_transaction[record[TRANSACTION]] = {
                    name: record[name] for name in OF_ANSWER if name in record
                }
    return by_transaction


def next_lines(folder: Path, path: Path, file: BinaryIO) -> tuple[list[bytes], int]:
    """The lines of a file that have not been sent, and where they end. Nothing writes meanwhile, so a line without an end is
    torn."""
    with locked(folder):
        file.seek(positions(folder).get(path.name, 0))
        return file.readlines(BATCH_BYTES), file.tell()


def ratings_of(lines: list[bytes]) -> list[Record]:
    """The ratings in these lines; lines torn by a power cut are skipped."""
    ratings = []
    for line in lines:
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            if record := parsed(line):
                mark(record)
                datetime.fromisoformat(record["event.created"]).timestamp()
                ratings.append(record)
    return ratings


def ship_file(folder: Path, path: Path, client: "Elasticsearch", shipped: Shipped) -> None:
    """Send the content of a file of ratings; raises AwayError."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:  # forgotten meanwhile
            return
        with file:
            lines, end = next_lines(folder, path, file)
            if not lines:
                return
            records = ratings_of(lines)
            by_transaction = answers(folder, records)
            send(
                client,
                (
                    operation
                    for record in records
                    for operation in operations(
                        mark(record), document(record, by_transaction.get(record[TRANSACTION], {}))
                    )
                ),
                shipped,
            )
            shipped.sent += len(records)
            with locked(folder):
                # A file that was rewritten has no position any more. It is another file, since this one is open.
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    put_positions(folder, positions(folder) | {path.name: end})


def remove(folder: Path, client: "Elasticsearch", shipped: Shipped) -> None:
    """Delete from the index what left the journal; raises AwayError. Failed deletions are tried again by the next run."""
    path = folder / SHIPPING / UNINDEXED
    if not path.exists():
        return
    with locked(folder):
        end = path.stat().st_size
    marks = list(read(path))
    refused = shipped.refused
    send(client, (operation for each in marks for operation in operations(each, None)), shipped)
    if shipped.refused > refused:
        raise AwayError(
            f"Elasticsearch refuses to delete ratings: {path} stays, and the next run tries again"
        )
    with locked(folder):
        if path.stat().st_size == end:  # else there is more to delete, and what was deleted is deleted again
            path.unlink()
            flush(path.parent)
    shipped.removed += len(marks)


def news(folder: Path) -> bool:
    """Whether there is anything to send or to delete."""
    offsets = positions(folder)
    return (folder / SHIPPING / UNINDEXED).exists() or any(
        size(path) > offsets.get(path.name, 0) for path in files(folder, RATED)
    )


def start_anew_with_another_key(folder: Path) -> None:
    """Drop all positions if the key is not the one with which they were reached.

    Role filebeat issues a key if Elasticsearch does not know the last one. It may have lost the ratings along with that key.
    """
    try:
        identifier, _ = read_key()
    except OSError:
        return  # `connected` says what to do
    noted = folder / SHIPPING / KEY_ID
    if not noted.exists() or noted.read_text() != identifier:
        with locked(folder):
            put_positions(folder, {})
        write_aside(noted, identifier)


def ship(folder: Path, url: str, pki: Path) -> Shipped:
    """Send and delete everything that is due; raises AwayError, after which nothing is lost."""
    shipped = Shipped()
    shipping = folder / SHIPPING
    shipping.mkdir(mode=0o700, exist_ok=True)
    with locked(shipping):  # two at a time could send what the other one has just deleted
        start_anew_with_another_key(folder)
        if news(folder):
            with connected(url, pki) as client:
                for path in files(folder, RATED):
                    ship_file(folder, path, client, shipped)
                remove(folder, client, shipped)
    return shipped
