"""`llm-serve documents add | list | status | remove | reindex | prepare | intake`: documents that gateways search for callers."""

import argparse
import json
import logging
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore.config import ConfigError, load
from llmgpu.record import RecordError, record
from llmserve.access.api_keys_cli import word
from llmserve.client_tls import ClientContext
from llmserve.credentials import SealedError, unsealed
from llmserve.documents.collection import Addition, CollectionError, Document, DocumentCollection, prepare
from llmserve.documents.embedding import EmbeddingError, connected
from llmserve.documents.extraction import UnreadableFile, text_of
from llmserve.documents.reindexing import Reindexed, Reindexing
from llmserve.settings import Documents, GatewayConfig

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

CONFIG = Path("/opt/llmkeep/current/etc/gateway-1.yaml")
KEY = "elasticsearch.documents"  # credential: ID:SECRET of a key that may write the index
NO_SUCH_DOCUMENT = 3
PROGRESS_SECONDS = 5.0


def add_commands(commands: Any) -> None:
    """Add `documents` and its subcommands to the parser of llm-serve."""
    documents = commands.add_parser("documents", help="the organization's documents, which gateways search")
    verbs = documents.add_subparsers(dest="verb", required=True)
    adding = verbs.add_parser("add", help="add or replace documents; doing it again changes nothing")
    adding.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text or Markdown in UTF-8, PDF, DOCX, XLSX or HTML",
    )
    adding.set_defaults(run=add_command)
    listing = verbs.add_parser("list", help="list the documents of the collection")
    listing.add_argument("--json", action="store_true", help="one JSON object per line")
    listing.set_defaults(run=list_command)
    reporting = verbs.add_parser(
        "status", help="show the size of the collection, and whether its index answers"
    )
    reporting.add_argument("--json", action="store_true", help="as one JSON object")
    reporting.set_defaults(run=status_command)
    removing = verbs.add_parser("remove", help="remove documents by the ids that `list` prints")
    removing.add_argument("ids", nargs="+", metavar="ID")
    removing.set_defaults(run=remove_command)
    for each in adding, listing, reporting, removing:
        each.add_argument(
            "--collection", type=word, required=True, help="its name in the policy's llm/collections"
        )
        each.add_argument("--tenant", type=word, required=True, help="the tenant that owns the collection")
    reindexing = verbs.add_parser(
        "reindex", help="embed the passages of all collections with another model; can be interrupted"
    )
    reindexing.set_defaults(run=reindex_command)
    preparing = verbs.add_parser(
        "prepare", help="create the index, if there is none, for the unit that takes in uploads"
    )
    preparing.set_defaults(run=prepare_command)
    taking = verbs.add_parser(
        "intake", help="take in the files that gateways receive, until stopped; run as a unit of its own"
    )
    taking.set_defaults(run=intake_command)
    taking.add_argument("--config", type=Path, required=True, help="documents.yaml")
    for each in adding, listing, reporting, removing, reindexing, preparing:
        each.add_argument("--config", type=Path, default=CONFIG, help=f"gateway.yaml (default {CONFIG})")


@contextmanager
def client_of(documents: Documents, key: str = KEY) -> "Iterator[Elasticsearch]":
    """Elasticsearch's own client, with a key that may write; raises ConfigError."""
    from elasticsearch import Elasticsearch

    options: dict[str, Any] = {"request_timeout": 60}
    try:
        if documents.key_credential:
            identifier, _, secret = unsealed(key).decode("ascii").partition(":")
            options["api_key"] = (identifier, secret)
    except (SealedError, UnicodeDecodeError) as error:
        raise ConfigError(str(error)) from None
    if documents.tls:
        context: ssl.SSLContext = ClientContext(documents.tls, documents.url).get()
        options["ssl_context"] = context
    logging.getLogger("elastic_transport").setLevel(logging.WARNING)  # else a line for each request
    with Elasticsearch(documents.url, **options) as client:
        yield client


@contextmanager
def index(options: argparse.Namespace) -> "Iterator[tuple[Elasticsearch, GatewayConfig, Documents]]":
    """The index in the command's configuration; raises ConfigError if it cannot be reached or refuses."""
    from elasticsearch import ApiError, TransportError

    config = load(options.config, GatewayConfig)
    if config.documents is None:
        raise ConfigError(
            f"{options.config} has no key 'documents': add this host to the group `rag`, or set the key"
        )
    with client_of(config.documents) as client:
        try:
            yield client, config, config.documents
        except (ApiError, TransportError) as error:
            raise ConfigError(
                f"{config.documents.url} refuses, or cannot be reached ({str(error)[:300]}): see elasticsearch.service there"
            ) from None


@contextmanager
def collection(options: argparse.Namespace) -> Iterator[tuple[DocumentCollection, GatewayConfig, Documents]]:
    """The collection that the command names; raises ConfigError if the index cannot be reached."""
    with index(options) as (client, config, settings):
        yield DocumentCollection(client, settings.index, options.tenant, options.collection), config, settings


def engine(config: GatewayConfig, settings: Documents) -> Path:
    """The socket of the engine for embeddings; raises ConfigError if it is on another host."""
    if sockets := config.engines[settings.model].socket:
        return sockets[0]
    raise ConfigError(f"the engine of '{settings.model}' is on another host: run this command there")


def on_record(config: GatewayConfig, action: str, fields: dict[str, object]) -> None:
    """Record a change in the host's audit record; raises ConfigError."""
    if config.audit is None:
        raise ConfigError("key 'audit' is missing, and changes must be recorded: set it")
    try:
        record(config.audit.socket, action, fields)
    except RecordError as error:
        raise ConfigError(str(error)) from None


def about(options: argparse.Namespace, document: Document) -> dict[str, object]:
    """The audit record's fields for a document."""
    return {
        "organization.id": options.tenant,
        "llmkeep.documents.collection": options.collection,
        "llmkeep.documents.document": document.id,
        "llmkeep.documents.revision": document.revision,
        "llmkeep.documents.count": document.passages,
    }


def add_command(options: argparse.Namespace) -> int:
    """Add each file by itself: files that cannot be read are named, and the others are added. Returns 1 if one was refused."""
    refused = 0
    with collection(options) as (documents, config, settings):
        socket = engine(config, settings)
        for file in options.files:

            def recorded(addition: Addition) -> None:
                on_record(config, f"document.{addition.outcome}", about(options, addition.document))

            try:
                text = text_of(file)
                with connected(socket) as embedder:
                    addition = documents.add(file.name, text, embedder, recorded)
            except (CollectionError, EmbeddingError, OSError, UnreadableFile) as error:
                print(f"llm-serve: {error}", file=sys.stderr)
                refused += 1
                continue
            print(
                f"{addition.document.id}  {addition.outcome}  {addition.document.passages} passages  {file.name}"
            )
    return 1 if refused else 0


def list_command(options: argparse.Namespace) -> int:
    with collection(options) as (documents, *_):
        for document in documents.documents():
            row = {
                "id": document.id,
                "name": document.name,
                "revision": document.revision,
                "passages": document.passages,
                "by": document.by,
            }
            print(
                json.dumps(row)
                if options.json
                else f"{document.id}  {document.passages} passages  {document.name}  by {document.by or 'an operator'}"
            )
    return 0


def status_command(options: argparse.Namespace) -> int:
    """Returns 1 if a part of the index does not answer."""
    with collection(options) as (documents, *_):
        try:
            status = documents.status()
        except CollectionError as error:
            raise ConfigError(str(error)) from None
    if options.json:
        print(json.dumps(asdict(status)))
    else:
        print(f"documents  {status.documents}")
        print(f"passages   {status.passages}, {status.letters} letters in total")
        print(f"revision   {status.revision}")
        print(f"vectors    {status.dimensions} dimensions, by {status.model or 'an unnamed model'}")
        print(f"index      {status.index}, {status.failed_shards} of {status.shards} shards failed")
        print(f"bytes      {status.bytes}, those of all collections")
    return 1 if status.failed_shards else 0


def remove_command(options: argparse.Namespace) -> int:
    """Remove documents; each removal is recorded before it begins."""
    missing = 0
    with collection(options) as (documents, config, _):
        by_id = {document.id: document for document in documents.documents()}
        for name in options.ids:
            if name not in by_id:
                print(
                    f"llm-serve: there is no document {name!r}: `llm-serve documents list` shows ids",
                    file=sys.stderr,
                )
                missing += 1
                continue
            on_record(config, "document.removed", about(options, by_id[name]))
            try:
                documents.remove(name)
            except CollectionError as error:
                raise ConfigError(str(error)) from None
            print(f"{name}  removed")
    return NO_SUCH_DOCUMENT if missing else 0


def prepare_command(options: argparse.Namespace) -> int:
    with index(options) as (client, config, settings):
        try:
            with connected(engine(config, settings)) as embedder:
                print(prepare(client, settings.index, embedder.hello))
        except (CollectionError, EmbeddingError) as error:
            raise ConfigError(str(error)) from None
    return 0


def intake_command(options: argparse.Namespace) -> int:
    import asyncio

    from llmcore import logs
    from llmserve.documents.intake import IntakeConfig, serve

    config = load(options.config, IntakeConfig)
    logs.configure("INFO")
    with client_of(config.documents, config.documents.key_credential or KEY) as client:
        asyncio.run(serve(config, client))
    return 0


def reindex_command(options: argparse.Namespace) -> int:
    """Re-index; the switch is recorded before it happens. Returns 2 if it did not happen: the old index then remains in use."""
    last = time.monotonic()

    def progress(count: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PROGRESS_SECONDS:
            print(f"{count} of {total} passages", file=sys.stderr, flush=True)
            last = now

    with index(options) as (client, config, settings):

        def recorded(outcome: Reindexed) -> None:
            fields: dict[str, object] = {
                "llmkeep.documents.index": outcome.after,
                "llmkeep.documents.index_before": outcome.before,
                "llmkeep.documents.count": outcome.passages,
            }
            on_record(config, "documents.reindexed", fields)

        try:
            with connected(engine(config, settings)) as embedder:
                outcome = Reindexing(client, settings.index, embedder, progress).run(recorded)
        except (CollectionError, EmbeddingError) as error:
            raise ConfigError(str(error)) from None
    if outcome.before == outcome.after:
        print(f"{outcome.after} already has the vectors of {settings.model}")
    else:
        print(f"{outcome.passages} passages: {outcome.after} replaces {outcome.before}")
    return 0
