"""The gateway as an ASGI application: one routing table, three layers around it, FastAPI for cold routes."""

import asyncio
from dataclasses import dataclass

from pydantic import BaseModel

from llmserve.access.policy import denied
from llmserve.api.errors import ApiError, unavailable
from llmserve.api.requests import ChatBody, CompletionBody, EmbeddingBody, GenerateBody
from llmserve.api.response_models import ChatCompletion, DrainState, Embeddings, Generated, TextCompletion
from llmserve.api.response_models import Health as HealthShape
from llmserve.gateway.completions import Completions, State
from llmserve.gateway.middleware import (
    App,
    Authentication,
    BodyLimit,
    Exchange,
    Receive,
    RequestId,
    Scope,
    Send,
    json_body,
    respond,
)


@dataclass(frozen=True)
class Route:
    """A path and who answers which method there. A path that ends in '/' stands for everything below it."""

    path: str
    methods: dict[str, App]
    public: bool = False
    hot: type[BaseModel] | None = None  # its body's model; such a route knows model and prompt
    answer: type[BaseModel] | None = None  # of a route that FastAPI does not know

    @property
    def pattern(self) -> str:
        """The path as policy names it."""
        return f"{self.path}*" if self.path.endswith("/") else self.path


@dataclass(frozen=True)
class PlainRoute:
    """A route as it is described: its body's model is None where there is none and nobody needs a key."""

    path: str
    methods: list[str]
    body: type[BaseModel] | None
    answer: type[BaseModel]


class Cold:
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
        """With the import that is meant."""
        from llmserve.gateway.fastapi_routes import cold_routes

        return cold_routes(self.state, self.plain)


class Health:
    """For systemd, load balancers and people: is the process alive, may it be asked."""

    def __init__(self, state: State) -> None:
        """`state` is read at each question."""
        self.state = state

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 as long as the event loop turns."""
        await respond(send, 200, b'{"status":"alive"}')

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if a request would be answered now, else 503 and why not."""
        reasons = []
        if self.state.draining:
            reasons.append("this gateway is stopping")
        if self.state.authenticator.keys.records is None:
            reasons.append("the API keys cannot be read")
        if not self.state.policy.ready:
            reasons.append("no policy decides")
        if not self.state.audit.up:
            reasons.append("nothing can be recorded")
        # How many, not which: anybody may ask, and which models there are is for those who may use them.
        fleets = self.state.fleets.values()
        if absent := sum(fleet.hello is None for fleet in fleets):
            reasons.append(f"{absent} of {len(fleets)} engines are not there")
        if stalled := sum(fleet.hello is not None and not fleet.up for fleet in fleets):
            reasons.append(f"{stalled} of {len(fleets)} engines make no step")
        if reasons:
            raise unavailable("not_ready", "not ready: " + "; ".join(reasons))
        await respond(send, 200, json_body({"status": "ready"}))

    async def drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether this gateway stops, and how many answers it still owes: at 0 nothing is lost any more."""
        state = "draining" if self.state.draining else "serving"
        await respond(send, 200, json_body({"status": state, "in_flight": len(self.state.flights.active)}))


def routing_table(state: State) -> list[Route]:
    """Every route there is."""
    completions = Completions(state)
    health = Health(state)
    cold = Cold(state)
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
    """Request id → body limit → authentication → policy and quotas → handler."""
    table = routing_table(state)
    public = frozenset(route.path for route in table if route.public)
    app = Authentication(Router(table, state), state.authenticator, public)
    return RequestId(BodyLimit(app, state.limits.body_bytes), state.metrics, state.recorder.close)
