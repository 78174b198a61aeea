"""`llmkeep logs find REQUEST_ID`: all hosts' log entries about one request. `llmkeep logs check`: detect lost entries.

Role elasticsearch writes the address of Elasticsearch to this host, and seals an API key here that can only read logs.

"""

import argparse
import base64
import json
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmkeep import logs_check
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError, Refused, printable
from llmkeep.places import Places
from llmkeep.sealing import unseal

KEY = "elasticsearch.reader"  # ID:SECRET, sealed by role elasticsearch
STREAMS = "logs-llmkeep.*"
MOST = 1000  # documents of one request; a gateway logs one, the edge another
NOTHING_FOUND = 3
UNAVAILABLE = 503
DESCRIPTION = """Prints all hosts' log entries about one request in chronological order.
The id is the response header X-Request-Id.
Exit codes: 0 found; 1 Elasticsearch was not reached, or refused; 3 there is no document of this request."""
CHECK = """Compares each host's counts of its journal with Elasticsearch's, by hour, and names missing entries.
Exit codes: 0 complete; 1 Elasticsearch was not reached, or refused; 3 entries are missing, or a host's count is invalid;
4 none is missing, but a host is silent."""


@contextmanager
def asked(places: Places) -> Iterator[Any]:
    """The official client, with this node's key and certificate; its errors become LlmkeepError."""
    # Here, since it takes longer to import than any other verb takes to run.
    from elasticsearch import ApiError, Elasticsearch, TransportError

    try:
        url = places.logs_url.read_text("ascii").strip()
        credential = (
            Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / KEY
        )  # of the timer's unit
        key = (
            credential.read_bytes() if credential.exists() else unseal(places.sealed(KEY).read_bytes(), KEY)
        ).decode("ascii")
    except FileNotFoundError as error:
        raise LlmkeepError(
            f"{error.filename} does not exist: this host is not the control node of an estate with Elasticsearch. "
            "Run this on "
            "the host in the group control, after site.yml with a host in the group search"
        ) from error
    context = ssl.create_default_context(cafile=str(places.root_certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(places.host_certificate, places.host_key)
    try:
        with Elasticsearch(
            url, api_key=base64.b64encode(key.encode()).decode(), ssl_context=context, request_timeout=10
        ) as client:
            yield client
    except (ApiError, TransportError) as error:
        raise LlmkeepError(
            f"{url} did not answer the search: {printable(str(error))}. See elasticsearch.service on that host, and run "
            "`llmkeep verify`"
        ) from error


def documents(client: Any, request: str) -> list[dict[str, Any]]:
    """Elasticsearch's documents about a request, oldest first; ApiError if a shard does not answer."""
    answer = client.search(
        index=STREAMS,
        allow_partial_search_results=False,
        query={"term": {"http.request.id": request}},
        sort=[{"@timestamp": {"order": "asc", "unmapped_type": "date"}}],
        size=MOST,
    )
    return [hit["_source"] for hit in answer["hits"]["hits"]]


def find(places: Places, request: str, seconds: float = 0) -> list[dict[str, Any]]:
    """Documents about a request, oldest first; repeats the query for SECONDS while there is none."""
    from elasticsearch import ApiError

    end = time.monotonic() + seconds
    with asked(places) as client:
        while True:
            try:
                matches = documents(client, request)
            except ApiError as error:
                # A stream that a first document is about to make has no shard yet.
                if error.meta.status != UNAVAILABLE or time.monotonic() >= end:
                    raise
            else:
                if matches or time.monotonic() >= end:
                    return matches
            time.sleep(0.2)


def line(document: dict[str, Any]) -> str:
    """A document as a line for a person: time, host, service and fields, without the shipping metadata."""
    rest = {
        name: value
        for name, value in document.items()
        if name not in ("@timestamp", "host", "service", "data_stream", "agent", "ecs", "systemd", "process")
    }
    where = document.get("host", {}).get("name", "?")
    by = document.get("service", {}).get("name") or document.get("data_stream", {}).get("dataset", "?")
    return printable(f"{document.get('@timestamp')} {where} {by} {json.dumps(rest, sort_keys=True)}")


def _find(arguments: argparse.Namespace) -> int:
    documents = find(arguments.places, arguments.request, arguments.wait)
    for document in documents:
        print(json.dumps(document, sort_keys=True) if arguments.json else line(document))
    if not documents:
        raise Refused(
            NOTHING_FOUND,
            f"no document has http.request.id {arguments.request!r}: use the id in the response header X-Request-Id; "
            "entries that a host has not shipped yet are in its journal (`journalctl -g ID`)",
        )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    with asked(arguments.places) as client:
        namespaces = arguments.places.logs_sources.read_text("ascii").split()
        sources = logs_check.check(
            client,
            namespaces,
            now - timedelta(hours=arguments.hours),
            now,
            timedelta(seconds=arguments.settle),
        )
    result = logs_check.recorded(sources, now)
    if arguments.record:
        write(arguments.places.logs_checked, result, 0o600)
    if arguments.json:
        print(result.decode())
    else:
        print("\n".join(map(printable, logs_check.lines(sources))))
    return logs_check.code(sources)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep logs …`."""
    verbs = subparsers.add_parser("logs", help="search and check the hosts' logs").add_subparsers(
        required=True, metavar="VERB"
    )
    parser = verbs.add_parser("find", help="print the documents about one request", description=DESCRIPTION)
    parser.add_argument("request", metavar="REQUEST_ID")
    parser.add_argument("--json", action="store_true", help="print each document as JSON, one per line")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="seconds to repeat the query while there is none (default 0)",
    )
    parser.set_defaults(run=_find, places=Places())
    parser = verbs.add_parser(
        "check", help="compare the numbers of written, shipped and indexed entries", description=CHECK
    )
    parser.add_argument("--hours", type=float, default=25, help="hours to look back (default 25)")
    parser.add_argument(
        "--settle",
        type=float,
        default=60,
        metavar="SECONDS",
        help="ignore counts newer than this, whose documents may be in transit (default 60)",
    )
    parser.add_argument("--record", action="store_true", help="also keep the result for this host's metrics")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_check, places=Places())
