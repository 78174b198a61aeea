"""Documents of collections, for callers whom the policy lets write them: a unit of its own lists, adds and removes them."""

from collections.abc import AsyncIterator
from typing import Literal

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from llmserve.api.errors import ApiError, unavailable
from llmserve.api.response_models import Shape
from llmserve.asgi import Exchange
from llmserve.documents.extraction import FORMATS, TEXT
from llmserve.documents.index import document_id
from llmserve.documents.intake_client import IntakeClient, away
from llmserve.documents.intake_protocol import Order, Outcome, Row, name_fault
from llmserve.gateway.state import State

STATUS = {"added": 201, "accepted": 202}
BUSY_SECONDS = 10
FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


class OwnCollection(Shape):
    """A collection that the caller may read or write."""

    id: str
    read: bool
    write: bool


class OwnCollections(Shape):
    """Response of GET /v1/collections. `suffixes`: of supported files; `upload_bytes`: limit for one file; `uploads`: whether
    this host accepts uploads.
    """

    object: Literal["list"] = "list"
    data: list[OwnCollection]
    uploads: bool
    upload_bytes: int
    suffixes: list[str]


class StoredDocument(Shape):
    """A document. `status`: `ready`, `waiting` or `failed`, or how adding or removing it ended; `by`: the subject that uploaded
    it, empty for one that an operator added; `reason`: why it failed; `revision`: SHA-256 of its text.
    """

    id: str
    name: str
    status: str
    passages: int
    revision: str
    by: str
    reason: str


class StoredDocuments(Shape):
    """Response of GET /v1/collections/{collection}/documents, by name."""

    object: Literal["list"] = "list"
    data: list[StoredDocument]


def shown(row: Row, status: str | None = None) -> StoredDocument:
    return StoredDocument(**row.model_dump() | {"status": status or row.status})


def writable(exchange: Exchange, collection: str) -> None:
    """Raises ApiError 403 for a collection that the caller may only read, 404 for one that it may not read either."""
    if exchange.decision is None:
        raise RuntimeError("this route must be behind authentication and policy")
    if collection in exchange.decision.writes:
        return
    if collection in exchange.decision.collections:
        message = f"you may read '{collection}', but not write it: ask for a role among its writers"
        raise ApiError(403, "denied", message)
    names = ", ".join(f"'{each}'" for each in sorted(exchange.decision.writes)) or "none"
    message = f"there is no collection '{collection[:64]}': you may write {names}"
    raise ApiError(404, "collection_not_found", message, "collection")


def order(
    exchange: Exchange, verb: Literal["add", "list", "remove"], collection: str, **more: object
) -> Order:
    """The order for the caller's request; its ids are in the audit record."""
    identity, decision = exchange.identity, exchange.decision
    if identity is None or decision is None:
        raise RuntimeError("this route must be behind authentication and policy")
    exchange.recorded["llmkeep.documents.collection"] = collection
    fields = {
        "verb": verb,
        "tenant": identity.tenant,
        "collection": collection,
        "subject": identity.subject,
        "transaction": exchange.transaction,
        "decision": decision.id,
    }
    return Order.model_validate(fields | more)


def size_of(request: Request) -> int:
    """The bytes of the file; raises ApiError 411."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise ApiError(411, "length_required", "the body has no Content-Length: send the file as a whole")
    return int(length)


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The file as it arrives; raises ApiError 400 if it is cut off."""
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise ApiError(400, "invalid_request", "the file was cut off: send it again") from None


def refuse(outcome: Outcome) -> None:
    """Raises ApiError for an order that was not carried out."""
    if outcome.status == "unreadable":
        raise ApiError(422, "unreadable_document", outcome.reason, "name")
    if outcome.status == "missing":
        message = "there is no document with this id: GET the collection's documents for their ids"
        raise ApiError(404, "document_not_found", message, "document")
    if outcome.status == "busy":
        raise unavailable("documents_busy", outcome.reason, BUSY_SECONDS)
    if outcome.status == "failed":
        raise unavailable("documents_unavailable", outcome.reason, BUSY_SECONDS)


def add_upload_routes(app: FastAPI, state: State) -> None:
    """Add the routes below /v1/collections."""

    def intake(exchange: Exchange, collection: str) -> IntakeClient:
        """The unit, for a collection that the caller may write; raises ApiError 403, 404 or 503."""
        writable(exchange, collection)
        if state.intake is None:
            raise away()
        return state.intake

    @app.get("/v1/collections")
    async def own_collections(request: Request) -> OwnCollections:
        """The collections that the caller may read or write."""
        decision = request.scope["llm"].decision
        names = sorted(decision.collections | decision.writes)
        data = [
            OwnCollection(id=name, read=name in decision.collections, write=name in decision.writes)
            for name in names
        ]
        limit = state.documents.settings.upload_bytes if state.documents else 0
        return OwnCollections(
            data=data,
            uploads=state.intake is not None,
            upload_bytes=limit,
            suffixes=sorted(TEXT | FORMATS.keys()),
        )

    @app.get("/v1/collections/{collection}/documents")
    async def list_documents(request: Request, collection: str) -> StoredDocuments:
        """The documents of a collection that the caller may write, including those that are waiting or have failed."""
        exchange: Exchange = request.scope["llm"]
        unit = intake(exchange, collection)
        outcome = await unit.ask(order(exchange, "list", collection))
        refuse(outcome)
        return StoredDocuments(data=[shown(row) for row in outcome.documents])

    @app.post(
        "/v1/collections/{collection}/documents",
        openapi_extra={"requestBody": {"required": True, "content": FILE}},
    )
    async def add_document(
        request: Request, response: Response, collection: str, name: str = ""
    ) -> StoredDocument:
        """Add the file in the body under the name in the query, or replace the document of that name."""
        exchange: Exchange = request.scope["llm"]
        unit = intake(exchange, collection)
        if fault := name_fault(name):
            raise ApiError(400, "invalid_value", f"'name' {fault}", "name")
        upload = order(exchange, "add", collection, name=name, size=size_of(request))
        exchange.recorded["llmkeep.documents.document"] = document_id(upload.tenant, collection, name)
        outcome = await unit.ask(upload, pieces(request))
        refuse(outcome)
        [row] = outcome.documents
        exchange.recorded["llmkeep.documents.outcome"] = outcome.status
        response.status_code = STATUS.get(outcome.status, 200)
        return shown(row, outcome.status)

    @app.delete("/v1/collections/{collection}/documents", status_code=204)
    async def remove_document(request: Request, collection: str, document: str = "") -> Response:
        """Remove the document with this id; searches no longer find it."""
        exchange: Exchange = request.scope["llm"]
        unit = intake(exchange, collection)
        exchange.recorded["llmkeep.documents.document"] = document[:64]
        refuse(await unit.ask(order(exchange, "remove", collection, document=document[:64])))
        return Response(status_code=204)
