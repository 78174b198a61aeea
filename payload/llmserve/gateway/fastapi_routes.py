"""The rarely used routes: the list of models and the OpenAPI document, by FastAPI. Imported on first use."""

from typing import Annotated

from fastapi import FastAPI, Path, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from llmserve.api.errors import ApiError
from llmserve.feedback.own import Forgotten, Kept
from llmserve.feedback.ratings import Feedback, FeedbackBody
from llmserve.gateway.openapi import describe
from llmserve.gateway.route import PlainRoute
from llmserve.gateway.state import State, no_such_model


class Model(BaseModel):
    """A model as listed by OpenAI's API. `context`: in tokens. `dimensions`: length of its vectors, for an embedding
    model. `parent`: the base model of an adapter. `quarantined`: whether it is answered from sick GPUs only, for
    gateways that have other hosts, too.
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


class Models(BaseModel):
    """The list of models."""

    object: str = "list"
    data: list[Model]


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

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        """Handled here, because FastAPI turns exceptions that leave it into a plain 500."""
        return Response(error.body(), error.status, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        """Paths that Starlette's router does not match, such as a line feed in a name."""
        code = "unknown_path" if error.status_code == 404 else "invalid_request"
        refused = ApiError(error.status_code, code, f"{request.method} here: {error.detail}")
        return await refuse(request, refused)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Models:
        """The models that the caller may use."""
        return Models(data=[described(name) for name in state.visible(request.scope["llm"])])

    @app.get("/v1/models/{name:path}")
    async def get_model(request: Request, name: Annotated[str, Path()]) -> Model:
        """One of the models that the caller may use."""
        visible = state.visible(request.scope["llm"])
        if name not in visible:
            raise no_such_model(name, visible)
        return described(name)

    body = {"application/json": {"schema": FeedbackBody.model_json_schema()}}

    @app.post("/v1/feedback", openapi_extra={"requestBody": {"required": True, "content": body}})
    async def rate(request: Request) -> Feedback:
        """Rate an answer. A later rating of the same answer takes the place of the one before."""
        return await state.ratings.rate(request.scope["llm"], await request.body())

    @app.get("/v1/feedback")
    async def list_kept(request: Request) -> Kept:
        """What this host keeps of the caller: ratings, and exchanges where the tenant's policy keeps text."""
        return await state.own.list(request.scope["llm"])

    @app.delete("/v1/feedback")
    async def forget(request: Request) -> Forgotten:
        """Delete all that this host's journal keeps of the caller."""
        return await state.own.forget(request.scope["llm"])

    app.openapi = lambda: describe(app, plain)  # type: ignore[method-assign]
    return app
