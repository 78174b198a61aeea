"""The routing table, and the gateway as an ASGI application: middleware around a router, FastAPI for cold routes."""

import asyncio

from llmserve.access.policy import denied
from llmserve.api.errors import ApiError
from llmserve.api.requests import ChatBody, CompletionBody, EmbeddingBody, GenerateBody
from llmserve.api.response_models import ChatCompletion, DrainState, Embeddings, Generated, TextCompletion
from llmserve.api.response_models import Health as HealthShape
from llmserve.asgi import App, Exchange, Receive, Scope, Send
from llmserve.gateway.completions import Completions
from llmserve.gateway.health import Health
from llmserve.gateway.middleware import AccessLog, Authentication, BodyLimit, ErrorEnvelope, RequestContext
from llmserve.gateway.route import PlainRoute, Route
from llmserve.gateway.state import State


class ColdRoutes:
    """What is asked seldom. FastAPI is loaded by the first who asks: no other module takes so much memory."""

    def __init__(self, state: State) -> None:
        """`plain` is set once the table is there: the routes that FastAPI's document is to describe as well."""
        self.state = state
        self.plain: list[PlainRoute] = []
        self.making = asyncio.Lock()
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Loading takes a thread of its own, so that answers go on meanwhile."""
        async with self.making:
            if self.app is None:
                self.app = await asyncio.to_thread(self.make)
        await self.app(scope, receive, send)

    def make(self) -> App:
        """Import FastAPI, and build its application."""
        from llmserve.gateway.fastapi_routes import cold_routes

        return cold_routes(self.state, self.plain)


def routing_table(state: State) -> list[Route]:
    """Every route there is."""
    completions = Completions(state)
    health = Health(state)
    cold = ColdRoutes(state)
    making: dict[str, App] = {"GET": completions.generate, "POST": completions.generate}
    table = [
        Route("/v1/chat/completions", {"POST": completions.chat}, hot=ChatBody, answer=ChatCompletion),
        Route("/v1/completions", {"POST": completions.completion}, hot=CompletionBody, answer=TextCompletion),
        Route("/generate", making, hot=GenerateBody, answer=Generated),
        Route("/v1/embeddings", {"POST": completions.embeddings}, hot=EmbeddingBody, answer=Embeddings),
        Route("/v1/models", {"GET": cold}),
        Route("/v1/models/", {"GET": cold}),
        Route("/openapi.json", {"GET": cold}),
        Route("/livez", {"GET": health.live}, public=True, answer=HealthShape),
        Route("/readyz", {"GET": health.ready}, public=True, answer=HealthShape),
        # vLLM's name for it, which clients such as guidellm ask first.
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
    """The innermost layer: looks a request up in the table, and lets nothing but public routes past the policy."""

    def __init__(self, table: list[Route], state: State) -> None:
        """Exact paths first, then those that stand for what is below them."""
        self.state = state
        self.exact = {route.path: route for route in table if not route.path.endswith("/")}
        self.below = [route for route in table if route.path.endswith("/")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; raises ApiError 404 or 405."""
        path = scope["path"]
        route = self.exact.get(path)
        if route is None:
            route = next(
                (each for each in self.below if path.startswith(each.path) and path != each.path), None
            )
        if route is None:
            raise ApiError(
                404, "unknown_path", f"there is nothing at '{path[:80]}': GET /openapi.json lists what is"
            )
        exchange: Exchange = scope["llm"]
        exchange.route = route.path
        app = route.methods.get(scope["method"])
        if app is None:
            allowed = ", ".join(route.methods)
            raise ApiError(
                405,
                "method_not_allowed",
                f"{route.path} does not know {scope['method'][:20]}: use {allowed}",
                headers=[(b"allow", allowed.encode())],
            )
        if not route.public:
            await self.admit(exchange, f"{scope['method']} {route.pattern}")
            if route.hot is None:  # the others know model and prompt, and record their intent themselves
                await self.state.recorder.intent(exchange, None, None)
        await app(scope, receive, send)

    async def admit(self, exchange: Exchange, action: str) -> None:
        """Return where policy and quota allow it; raises ApiError 403, 429 or 503."""
        identity = exchange.identity
        if identity is None:
            raise RuntimeError("a route that is not public stands behind authentication")
        exchange.action = action
        decision = exchange.decision = await self.state.policy.decide(identity, action)
        if not decision.allow:
            raise denied(decision)
        await self.state.quotas.request(identity.tenant, identity.subject, decision)


def build_app(state: State) -> App:
    """Request context → access log → error envelope → body limit → authentication → policy and quotas → handler."""
    table = routing_table(state)
    public = frozenset(route.path for route in table if route.public)
    app: App = Authentication(Router(table, state), state.authenticator, public)
    app = ErrorEnvelope(BodyLimit(app, state.limits.body_bytes), state.metrics)
    return RequestContext(AccessLog(app, state.metrics, state.recorder.close), state.metrics)
