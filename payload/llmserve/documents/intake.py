"""`llm-serve documents intake`: the unit that reads uploaded files and writes them to the index; gateways may not.

Only the gateway's user may connect. Files are held in memory only. A few are accepted at once; one at a time is read by the
confined parser of extraction.py, and others are refused until there is room. If a file takes long, its caller gets a response
before it is done.
"""

import asyncio
import logging
import os
import pwd
import socket
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from llmcore import logs
from llmcore.config import Section
from llmcore.notify import notify
from llmgpu.record import RecordError, record
from llmserve.documents.collection import (
    Addition,
    CollectionError,
    Document,
    DocumentCollection,
    NoText,
    current_index,
)
from llmserve.documents.embedding import EmbeddingError, connected
from llmserve.documents.extraction import UnreadableFile, suffix_of, text_in
from llmserve.documents.index import document_id
from llmserve.documents.intake_protocol import BODY_SECONDS, LINE_BYTES, Order, Outcome, Row, name_fault
from llmserve.settings import AuditWriter, Documents
from llmserve.signals import StopSignals
from llmserve.sockets import bind_unix

if TYPE_CHECKING:
    from elasticsearch import Elasticsearch

log = logging.getLogger("llmserve.documents.intake")
PLACES = 4  # files in memory, the one that is read included
TENANT_PLACES = 2
MOST_FAILURES = 256  # that lists show
ORDER_SECONDS = 10.0
WAIT_SECONDS = 20.0  # until a caller is told that its file goes on
STOP_SECONDS = 30.0
CHUNK = 256 << 10
PEER = struct.Struct("3i")  # ucred: pid, uid, gid
BUSY = "other documents are being added: try again in a few seconds"
AWAY = (
    "the index cannot be reached, or refuses: try again later; operators find the reason in this unit's log"
)
NO_INDEX = (
    "there is no index of documents yet: ask an operator to restart llm-documents.service, which creates it"
)


class IntakeConfig(Section):
    """`llm-serve documents intake --config`. `gateway_user`: the only user that may connect to `socket`. `engine`: the socket of
    the model for embeddings.
    """

    socket: Path
    gateway_user: str
    documents: Documents
    engine: Path
    audit: AuditWriter


class Busy(Exception):
    """There is no room for another file."""


class Places:
    """Limits the files in memory at once, in total and per tenant, so that no tenant blocks the others."""

    def __init__(self) -> None:
        self.of_tenant: Counter[str] = Counter()

    def take(self, tenant: str) -> None:
        """Raises Busy."""
        if self.of_tenant.total() >= PLACES or self.of_tenant[tenant] >= TENANT_PLACES:
            raise Busy
        self.of_tenant[tenant] += 1

    def leave(self, tenant: str) -> None:
        self.of_tenant[tenant] -= 1


class Intake:
    """Carries out the orders of gateways."""

    def __init__(self, config: IntakeConfig, client: "Elasticsearch") -> None:
        """Raises KeyError if the gateway's user is unknown."""
        self.config = config
        self.client = client
        self.gateway = pwd.getpwnam(config.gateway_user).pw_uid
        self.places = Places()
        self.turn = asyncio.Lock()
        self.waiting: dict[str, Row] = {}  # by document, as the failures
        self.failures: OrderedDict[str, Row] = OrderedDict()
        self.work: set[asyncio.Task[Any]] = (
            set()
        )  # on files that are here as a whole, and who answers for them

    def collection(self, order: Order) -> DocumentCollection:
        return DocumentCollection(self.client, self.config.documents.index, order.tenant, order.collection)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one order of a gateway; other clients are disconnected."""
        answering = cast("asyncio.Task[Any]", asyncio.current_task())
        link: socket.socket = writer.get_extra_info("socket")
        _, user, _ = PEER.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        try:
            if user != self.gateway:
                log.error("a process other than a gateway has connected", extra={"fields": {"user.id": user}})
                return
            async with asyncio.timeout(ORDER_SECONDS):
                order = Order.model_validate_json(await reader.readuntil(b"\n"))
            outcome = await self.answer(order, reader, writer, answering)
            writer.write(outcome.model_dump_json().encode() + b"\n")
            await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.warning("an order was cut off", extra={"fields": {"error": type(error).__name__}})
        except ValidationError:
            log.error("an order was invalid: check that gateway and unit run the same release")
        finally:
            self.work.discard(answering)
            writer.close()

    async def answer(
        self,
        order: Order,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answering: asyncio.Task[Any],
    ) -> Outcome:
        """Raises OSError, TimeoutError or IncompleteReadError if the file does not arrive."""
        if order.verb == "list":
            return await asyncio.to_thread(self.guarded, lambda: self.list(order))
        if order.verb == "remove":
            async with self.turn:
                return await asyncio.to_thread(self.guarded, lambda: self.remove(order))
        if fault := self.fault(order):
            return Outcome(status="unreadable", reason=fault)
        try:
            self.places.take(order.tenant)
        except Busy:
            return Outcome(status="busy", reason=BUSY)
        task = None
        try:
            writer.write(Outcome(status="go").model_dump_json().encode() + b"\n")
            content = await self.received(order, reader)
            task = asyncio.create_task(self.add(order, content))
        except TimeoutError:
            return Outcome(
                status="failed", reason=f"the file did not arrive within {BODY_SECONDS:.0f} s: send it again"
            )
        finally:
            if task is None:
                self.places.leave(order.tenant)
        self.work |= {task, answering}
        task.add_done_callback(self.work.discard)
        done, _ = await asyncio.wait({task}, timeout=WAIT_SECONDS)
        return task.result() if done else Outcome(status="accepted", documents=(self.row(order),))

    def fault(self, order: Order) -> str:
        """Why a file of this name and size is refused; empty if it is accepted."""
        if fault := name_fault(order.name):
            return f"the name {fault}"
        if order.size > self.config.documents.upload_bytes:
            return f"it has {order.size} bytes, the limit is {self.config.documents.upload_bytes}: split it"
        try:
            suffix_of(Path(order.name))
        except UnreadableFile as error:
            return str(error)
        return ""

    async def received(self, order: Order, reader: asyncio.StreamReader) -> IO[bytes]:
        """The file, in memory; raises IncompleteReadError or TimeoutError."""
        content = os.fdopen(os.memfd_create("document", os.MFD_CLOEXEC), "w+b")
        try:
            left = order.size
            async with asyncio.timeout(BODY_SECONDS):
                while left:
                    piece = await reader.readexactly(min(left, CHUNK))
                    content.write(piece)
                    left -= len(piece)
            content.flush()
            content.seek(0)
        except BaseException:
            content.close()
            raise
        return content

    def row(self, order: Order, reason: str = "") -> Row:
        """The row of a file that is not in the index."""
        return Row(
            id=document_id(order.tenant, order.collection, order.name),
            name=order.name,
            status="failed" if reason else "waiting",
            by=order.subject,
            reason=reason,
        )

    async def add(self, order: Order, content: IO[bytes]) -> Outcome:
        """Read the file and write its passages, after the files that came before it."""
        row = self.row(order)
        self.failures.pop(row.id, None)
        self.waiting[row.id] = row
        try:
            with content:
                async with self.turn:
                    outcome = await asyncio.to_thread(self.guarded, lambda: self.added(order, content))
        finally:
            self.places.leave(order.tenant)
            self.waiting.pop(row.id, None)
        if outcome.status in {"unreadable", "failed"}:
            self.failures[row.id] = self.row(order, outcome.reason)
            if len(self.failures) > MOST_FAILURES:
                self.failures.popitem(last=False)
        return outcome

    def added(self, order: Order, content: IO[bytes]) -> Outcome:
        """Raises what `guarded` expects."""
        text = text_in(Path(order.name), content)

        def recorded(addition: Addition) -> None:
            self.on_record(order, f"document.{addition.outcome}", addition.document)

        if current_index(self.client, self.config.documents.index) is None:
            raise CollectionError(NO_INDEX)
        with connected(self.config.engine) as embedder:
            addition = self.collection(order).add(order.name, text, embedder, recorded, order.subject)
        return Outcome(status=addition.outcome, documents=(ready(addition.document),))

    def remove(self, order: Order) -> Outcome:
        """Remove a document; the removal is recorded before it begins. Raises what `guarded` expects."""
        documents = self.collection(order)
        known = {each.id: each for each in documents.documents()}
        failed = order.document in {each.id for each in self.own(order, self.failures.copy().values())}
        if failed:
            self.failures.pop(order.document, None)
        if order.document not in known:
            return Outcome(status="removed" if failed else "missing")
        self.on_record(order, "document.removed", known[order.document])
        documents.remove(order.document)
        return Outcome(status="removed", documents=(ready(known[order.document]),))

    def list(self, order: Order) -> Outcome:
        """Documents in the index, and those that are waiting or have failed since this unit started. Raises what `guarded`
        expects."""
        rows = {each.id: ready(each) for each in self.collection(order).documents()}
        for each in self.own(order, (*self.failures.copy().values(), *self.waiting.copy().values())):
            rows[each.id] = each
        return Outcome(
            status="listed", documents=tuple(sorted(rows.values(), key=lambda each: (each.name, each.id)))
        )

    def own(self, order: Order, rows: Iterable[Row]) -> Sequence[Row]:
        """Keep those of the order's collection: an id contains tenant and collection."""
        return [each for each in rows if each.id == document_id(order.tenant, order.collection, each.name)]

    def on_record(self, order: Order, action: str, document: Document) -> None:
        """Raises RecordError."""
        fields: dict[str, object] = {
            "transaction.id": order.transaction,
            "user.id": order.subject,
            "organization.id": order.tenant,
            "llmkeep.decision.id": order.decision,
            "llmkeep.documents.collection": order.collection,
            "llmkeep.documents.document": document.id,
            "llmkeep.documents.revision": document.revision,
            "llmkeep.documents.count": document.passages,
        }
        record(self.config.audit.socket, action, fields)

    def guarded(self, work: Callable[[], Outcome]) -> Outcome:
        """The outcome of `work`; failures are outcomes, too, and are logged without the file's name."""
        from elasticsearch import ApiError, TransportError

        try:
            return work()
        except (NoText, UnreadableFile) as error:
            return Outcome(status="unreadable", reason=str(error))
        except (CollectionError, EmbeddingError) as error:
            return Outcome(status="failed", reason=str(error))
        except (ApiError, TransportError, RecordError, OSError) as error:
            log.error(
                "an order failed",
                extra={"fields": {"error": type(error).__name__, "reason": str(error)[:200]}},
            )
            return Outcome(status="failed", reason=AWAY)


def ready(document: Document) -> Row:
    return Row(
        id=document.id,
        name=document.name,
        status="ready",
        passages=document.passages,
        revision=document.revision,
        by=document.by,
    )


async def serve(config: IntakeConfig, client: "Elasticsearch") -> None:
    """Serve until SIGTERM or SIGINT; files that were accepted are then read, for at most STOP_SECONDS."""
    logs.guard(asyncio.get_running_loop())
    intake = Intake(config, client)
    stop = StopSignals()
    bound = bind_unix(config.socket, 0o660)
    async with await asyncio.start_unix_server(intake.connection, sock=bound, limit=LINE_BYTES) as server:
        notify("READY=1")
        await stop.requested.wait()
        notify("STOPPING=1")
        server.close()
        late = (await asyncio.wait(intake.work, timeout=STOP_SECONDS))[1] if intake.work else ()
        if late:
            log.warning("stopped before documents were added", extra={"fields": {"count": len(late)}})
            logging.shutdown()
            os._exit(
                0
            )  # no thread can be cancelled, and systemd would call it a failure after killing this one
        server.close_clients()  # whose files are not here as a whole
