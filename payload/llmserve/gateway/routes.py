"""The routing table, and the gateway as an ASGI application: middleware around a router, FastAPI for rarely used
routes.
"""

import asyncio

from llmserve.access.policy import denied
from llmserve.api.errors import ApiError
from llmserve.api.requests import ChatBody, CompletionBody, EmbeddingBody, GenerateBody
from llmserve.api.response_models import ChatCompletion, DrainState, Embeddings, Generated, TextCompletion
from llmserve.api.response_models import Health as HealthShape
from llmserve.api.responses_api_body import ResponsesBody
from llmserve.api.responses_api_shapes import ResponseObject
from llmserve.asgi import OTHER_ROUTE, App, Exchange, Receive, Scope, Send
from llmserve.gateway.completions import Completions
from llmserve.gateway.health import Health
from llmserve.gateway.middleware import (
    AccessLog,
    Authentication,
    BodyDrain,
    BodyLimit,
    ErrorEnvelope,
    RequestContext,
)
from llmserve.gateway.route import PlainRoute, Route
from llmserve.gateway.search import Passages, Search, SearchBody
from llmserve.gateway.state import State
from llmserve.settings import MOST_BODY_BYTES

COLLECTIONS = "/v1/collections/"


class ColdRoutes:
    """The rarely used routes. FastAPI is imported by their first request: no other module takes as much memory."""

    def __init__(self, state: State) -> None:
        """`plain`, the routes to document as well, is set once the table exists."""
        self.state = state
        self.plain: list[PlainRoute] = []
        self.making = asyncio.Lock()
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI is imported in a thread of its own, so that other requests are answered meanwhile."""
        async with self.making:
            if self.app is None:
                self.app = await asyncio.to_thread(self.make)
        await self.app(scope, receive, send)

    def make(self) -> App:
        from llmserve.gateway.fastapi_routes import cold_routes

        return cold_routes(self.state, self.plain)


def routing_table(state: State) -> list[Route]:
    completions = Completions(state)
    health = Health(state)
    cold = ColdRoutes(state)
    making: dict[str, App] = {"GET": completions.generate, "POST": completions.generate}
    table = [
        Route("/v1/chat/completions", {"POST": completions.chat}, hot=ChatBody, answer=ChatCompletion),
        Route("/v1/completions", {"POST": completions.completion}, hot=CompletionBody, answer=TextCompletion),
        Route("/v1/responses", {"POST": completions.responses}, hot=ResponsesBody, answer=ResponseObject),
        Route("/generate", making, hot=GenerateBody, answer=Generated),
        Route("/v1/embeddings", {"POST": completions.embeddings}, hot=EmbeddingBody, answer=Embeddings),
        Route("/v1/search", {"POST": Search(state)}, hot=SearchBody, answer=Passages),
        Route("/v1/feedback", {"POST": cold, "GET": cold, "DELETE": cold}),
        Route("/v1/collections", {"GET": cold}),
        Route(COLLECTIONS, {"GET": cold, "POST": cold, "DELETE": cold}),
        Route("/v1/models", {"GET": cold}),
        Route("/v1/models/", {"GET": cold}),
        Route("/v1/usage", {"GET": cold}),
        Route("/openapi.json", {"GET": cold}),
        Route("/livez", {"GET": health.live}, public=True, answer=HealthShape),
        Route("/readyz", {"GET": health.ready}, public=True, answer=HealthShape),
        # vLLM's name for it, which clients such as guidellm check first.
        Route("/health", {"GET": health.ready}, public=True, answer=HealthShape),
        Route("/drainz", {"GET": health.drain}, public=True, answer=DrainState),
    ]
    cold.plain = [
        PlainRoute(route.path, list(route.methods), route.hot, route.answer)
        for route in table
        if route.answer
    ]
    return table


class Router:
    """The innermost layer: finds the route, and applies policy and quotas to all but public routes."""

    def __init__(self, table: list[Route], state: State) -> None:
        """Exact paths take precedence over those that end in '/'."""
        self.state = state
        self.exact = {route.path: route for route in table if not route.path.endswith("/")}
        self.below = [route for route in table if route.path.endswith("/")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError 404 or 405."""
        path = scope["path"]
        route = self.exact.get(path)
        if route is None:
            route = next(
                (each for each in self.below if path.startswith(each.path) and path != each.path), None
            )
        if route is None:
            raise ApiError(
                404, "unknown_path", f"there is no route '{path[:80]}': GET /openapi.json lists all routes"
            )
        exchange: Exchange = scope["llm"]
        exchange.route = route.path
        app = route.methods.get(scope["method"])
        if app is None:
            allowed = ", ".join(route.methods)
            raise ApiError(
                405,
                "method_not_allowed",
                f"{route.path} does not support {scope['method'][:20]}: use {allowed}",
                headers=[(b"allow", allowed.encode())],
            )
        if not route.public:
            await self.admit(exchange, f"{scope['method']} {route.pattern}")
            if route.hot is None:  # hot routes know model and prompt, and record their intent themselves
                await self.state.recorder.intent(exchange)
        await app(scope, receive, send)

    async def admit(self, exchange: Exchange, action: str) -> None:
        """Apply policy and quotas; raises ApiError 403, 429 or 503."""
        identity = exchange.identity
        if identity is None:
            raise RuntimeError("a route that is not public must be behind authentication")
        exchange.action = action
        decision = exchange.decision = await self.state.policy.decide(identity, action)
        if not decision.allow:
            raise denied(decision)
        await self.state.quotas.request(identity.tenant, identity.subject, decision)


def build_app(state: State) -> App:
    """Request context → access log → body drain → error envelope → body limit → authentication → policy and quotas → handler."""
    table = routing_table(state)
    state.metrics.expect([*(route.path for route in table), OTHER_ROUTE])
    public = frozenset(route.path for route in table if route.public)
    app: App = Authentication(Router(table, state), state.authenticator, public)

    def limit() -> int:
        return state.limits.largest_body([each.room.context for each in state.instances.values()])

    # Without documents no file is taken, and 404 says so.
    uploads = state.documents.settings.upload_bytes if state.documents else 0
    app = ErrorEnvelope(BodyLimit(app, limit, COLLECTIONS, uploads or MOST_BODY_BYTES), state.metrics)
    app = BodyDrain(app, COLLECTIONS)
    return RequestContext(AccessLog(app, state.metrics, state.recorder.close), state.metrics)
