"""The rarely used routes: models, own usage, feedback and the OpenAPI document, by FastAPI. Imported on first use."""

from datetime import UTC, date, datetime
from typing import Annotated, Literal

from fastapi import FastAPI, Path, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from llmserve.access.aliases import Alias
from llmserve.access.quotas import Window
from llmserve.api.errors import ApiError, unavailable
from llmserve.api.response_models import Shape
from llmserve.feedback.own import Forgotten, Kept
from llmserve.feedback.ratings import Feedback, FeedbackBody
from llmserve.gateway.openapi import describe
from llmserve.gateway.route import PlainRoute
from llmserve.gateway.state import State, no_such_model
from llmserve.gateway.uploads import add_upload_routes
from llmserve.redis_client import RedisUnavailable


class Model(BaseModel):
    """A model as listed by OpenAI's API. `context`: in tokens. `dimensions`: length of its vectors, for an embedding
    model. `parent`: the base model of an adapter. `quarantined`: whether only instances on sick GPUs serve it, for gateways that
    have other hosts, too. `alias_of`: the model to which this name leads; `deprecated`: the day on which the name was deprecated;
    `sunset`: the day from which it may be removed; `collections`: of documents, to which its answers are limited.
    """

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "llmkeep"
    context: int | None
    revision: str | None
    dimensions: int | None
    parent: str | None
    quarantined: bool = False
    alias_of: str | None = None
    deprecated: date | None = None
    sunset: date | None = None
    collections: list[str] | None = None


class Models(BaseModel):
    """The list of models."""

    object: str = "list"
    data: list[Model]


class Quota(Shape):
    """What a subject may use in a calendar minute or UTC day. `resets_at`: its end, RFC 3339."""

    limit: int
    used: int
    remaining: int
    resets_at: str


class OwnUsage(Shape):
    """Response of GET /v1/usage: the caller's quotas at all gateways, by the rate class from the policy's decision on this
    request."""

    object: Literal["usage"] = "usage"
    rate_class: str
    requests_per_minute: Quota
    tokens_per_minute: Quota
    tokens_per_day: Quota


def quota(window: Window, used: int) -> Quota:
    ends = datetime.fromtimestamp(window.ends, UTC).isoformat().replace("+00:00", "Z")
    return Quota(limit=window.limit, used=used, remaining=max(0, window.limit - used), resets_at=ends)


def cold_routes(state: State, plain: list[PlainRoute]) -> FastAPI:
    """The FastAPI application, without documentation pages that would load from the internet; `plain` are documented
    as well.
    """
    app = FastAPI(title="llmkeep", version="1", docs_url=None, redoc_url=None)

    def described(name: str) -> Model:
        instances = state.instances.get(name)  # none: the name of an experiment
        hello = instances.hello if instances else None
        if instances is None or hello is None:
            return Model(id=name, context=None, revision=None, dimensions=None, parent=None)
        return Model(
            id=name,
            context=hello.context,
            revision=hello.revision,
            dimensions=hello.dimensions or None,
            parent=hello.parent or None,
            quarantined=instances.sick,
        )

    def aliased(name: str, alias: Alias) -> Model:
        """The model under another name."""
        changes = {
            "id": name,
            "alias_of": alias.model,
            "deprecated": alias.deprecated,
            "sunset": alias.sunset,
            "collections": list(alias.collections) or None,
        }
        return described(alias.model).model_copy(update=changes)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        """ApiError is handled here, because FastAPI turns exceptions that leave it into a plain 500."""
        headers = {name.decode(): value.decode() for name, value in error.headers}
        return Response(error.body(), error.status, headers, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        """Handle paths that Starlette's router does not match, such as one with a line feed in a name."""
        code = "unknown_path" if error.status_code == 404 else "invalid_request"
        refused = ApiError(error.status_code, code, f"{request.method} here: {error.detail}")
        return await refuse(request, refused)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Models:
        """The models that the caller may use, and their aliases."""
        exchange = request.scope["llm"]
        models = [described(name) for name in state.visible(exchange)]
        return Models(data=models + [aliased(*each) for each in state.aliases(exchange).items()])

    @app.get("/v1/models/{name:path}")
    async def get_model(request: Request, name: Annotated[str, Path()]) -> Model:
        """One of the models that the caller may use, by its name or an alias."""
        exchange = request.scope["llm"]
        visible, model = state.visible(exchange), state.resolve(exchange, name)
        if model not in visible:
            raise no_such_model(model, visible, name)
        return aliased(name, exchange.alias) if exchange.alias else described(model)

    @app.get("/v1/usage")
    async def own_usage(request: Request) -> OwnUsage:
        """The caller's quotas: limit, used and remaining of this minute and this day. This request counts, too."""
        identity, decision = request.scope["llm"].identity, request.scope["llm"].decision
        try:
            windows = await state.quotas.usage(identity.tenant, identity.subject, decision.rate)
        except RedisUnavailable:
            message = (
                "your usage is counted in Redis, which this gateway cannot reach: retry later. Requests are still answered, with "
                "a lower limit in each gateway process"
            )
            raise unavailable("usage_unavailable", message, retry_after=5) from None
        requests, minute, day = (quota(window, used) for window, used in windows)
        return OwnUsage(
            rate_class=decision.rate.name,
            requests_per_minute=requests,
            tokens_per_minute=minute,
            tokens_per_day=day,
        )

    body = {"application/json": {"schema": FeedbackBody.model_json_schema()}}

    @app.post("/v1/feedback", openapi_extra={"requestBody": {"required": True, "content": body}})
    async def rate(request: Request) -> Feedback:
        """Rate an answer. A later rating of the same answer replaces the earlier one."""
        return await state.ratings.rate(request.scope["llm"], await request.body())

    @app.get("/v1/feedback")
    async def list_kept(request: Request, before: str = "") -> Kept:
        """The caller's records on this host: ratings, and exchanges if the tenant's policy keeps text. `before`: a time, for the
        next page."""
        return await state.own.list(request.scope["llm"], before)

    @app.delete("/v1/feedback")
    async def forget(request: Request) -> Forgotten:
        """Delete all of the caller's records in this host's journal."""
        return await state.own.forget(request.scope["llm"])

    add_upload_routes(app, state)
    app.openapi = lambda: describe(app, plain)  # type: ignore[method-assign]
    return app
