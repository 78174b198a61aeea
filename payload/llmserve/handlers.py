"""The hot routes: plain ASGI callables from body to answer."""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass

from llmserve.answers import EmbeddingRendering, GenerateRendering, OpenAiRendering, Rendering, error_event
from llmserve.audit import AuditLink, Recorder
from llmserve.cache import ExactCache, key_material
from llmserve.decision import Decision
from llmserve.errors import ApiError
from llmserve.fleet import Fleet, Seat
from llmserve.flights import Flights
from llmserve.identity import Authenticator, Identity
from llmserve.link import Answer
from llmserve.metrics import Metrics
from llmserve.onion import Exchange, Receive, Scope, Send, respond
from llmserve.policy import Policy
from llmserve.protocol import Delta, Done, Event, Failed, Generate, Hello
from llmserve.quotas import Quotas
from llmserve.settings import Limits
from llmserve.wire import (
    Call,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerateBody,
    chat_call,
    completion_call,
    embedding_call,
    generate_call,
    parse_body,
    parse_query,
    refuse_other_work,
    refuse_undeclared,
    reserved_tokens,
)

LAST_WORD_SECONDS = 5.0  # for the error event at the end of a stream that broke
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


@dataclass
class State:
    """What the handlers of one gateway process share."""

    fleets: dict[str, Fleet]
    authenticator: Authenticator
    limits: Limits
    metrics: Metrics
    flights: Flights
    cache: ExactCache | None
    policy: Policy
    quotas: Quotas
    audit: AuditLink
    recorder: Recorder
    draining: bool = False

    def visible(self, exchange: Exchange) -> list[str]:
        """The models that this exchange's decision permits, in the order of the configuration."""
        decision = exchange.decision
        return [name for name in self.fleets if decision is not None and decision.permits(name)]


def no_such_model(name: str, visible: list[str]) -> ApiError:
    """404. A model that one may not ask looks like one that does not exist."""
    listed = ", ".join(f"'{model}'" for model in visible) or "none"
    message = f"there is no model '{name[:80]}' here: the models that you may ask are {listed}"
    return ApiError(404, "model_not_found", message, "model")


def asked_text(generate: Generate) -> str:
    """What was asked, as one text, for the audit record."""
    if generate.prompt is not None:
        return generate.prompt
    asked = generate.messages if generate.inputs is None else generate.inputs
    return json.dumps(asked, ensure_ascii=False, separators=(",", ":"))


async def read_body(receive: Receive) -> bytes:
    """The whole body; the layer around has limited it."""
    message = await receive()
    body: bytes = message.get("body", b"")
    while message.get("more_body", False):
        message = await receive()
        body += message.get("body", b"")
    return body


def failure(frame: Failed) -> ApiError:
    """What the engine said, for the client."""
    headers = [(b"retry-after", b"2")] if frame.status == 503 else []
    return ApiError(frame.status, frame.code, frame.message, frame.param, headers)


class Completions:
    """Every endpoint that makes text; they differ in what comes in and in how the answer looks."""

    def __init__(self, state: State) -> None:
        """`state` outlives every request."""
        self.state = state
        self.narrowed: dict[int, Limits] = {}

    def limits(self, scope: Scope) -> Limits:
        """This gateway's limits, and the shorter answers where the decision grants no longer ones."""
        exchange: Exchange = scope["llm"]
        ours = self.state.limits
        granted = exchange.decision.max_tokens if exchange.decision else 0
        if granted >= ours.max_tokens:
            return ours
        if granted not in self.narrowed:
            default = min(ours.default_max_tokens, granted)
            update = {"max_tokens": granted, "default_max_tokens": default}
            self.narrowed[granted] = ours.model_copy(update=update)
        return self.narrowed[granted]

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        call = chat_call(parse_body(ChatBody, await read_body(receive)), self.limits(scope))
        link, hello = self.engine(scope, call)
        rendering = OpenAiRendering(True, hello.model, hello.revision, call.include_usage)
        await self.answer(scope, receive, send, call, link, rendering)

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        call = completion_call(parse_body(CompletionBody, await read_body(receive)), self.limits(scope))
        link, hello = self.engine(scope, call)
        rendering = OpenAiRendering(False, hello.model, hello.revision, call.include_usage)
        await self.answer(scope, receive, send, call, link, rendering)

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET and POST /generate."""
        if scope["method"] == "GET":
            body = parse_query(scope["query_string"])
        else:
            body = parse_body(GenerateBody, await read_body(receive))
        call = generate_call(body, self.limits(scope))
        link, hello = self.engine(scope, call)
        await self.answer(scope, receive, send, call, link, GenerateRendering(hello.model))

    async def embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/embeddings."""
        body = parse_body(EmbeddingBody, await read_body(receive))
        call = embedding_call(body)
        link, hello = self.engine(scope, call, body.dimensions)
        await self.answer(scope, receive, send, call, link, EmbeddingRendering(hello.model))

    def engine(self, scope: Scope, call: Call, dimensions: int | None = None) -> tuple[Seat, Hello]:
        """A seat at the model asked for, or at the first that may be asked; raises ApiError 404, 503 or 400."""
        visible = self.state.visible(scope["llm"])
        name = call.model if call.model is not None else next(iter(visible), "")
        if name not in visible:
            raise no_such_model(name, visible)
        identity = scope["llm"].identity
        link = self.state.fleets[name].seat(identity.tenant, call.generate)
        refuse_undeclared(call.generate, link.hello.fields)
        refuse_other_work(call.generate, link.hello.dimensions, dimensions)
        return link, link.hello

    async def answer(
        self, scope: Scope, receive: Receive, send: Send, call: Call, link: Seat, rendering: Rendering
    ) -> None:
        """From the cache or from the engine, whole or streamed."""
        exchange: Exchange = scope["llm"]
        identity, decision = exchange.identity, exchange.decision
        if identity is None or decision is None:
            raise RuntimeError("a route that answers stands behind authentication and policy")
        exchange.model = link.model
        if self.state.draining:
            raise ApiError(
                503, "draining", "this gateway is stopping: ask again", headers=[(b"retry-after", b"5")]
            )
        await self.state.recorder.intent(exchange, link.model, asked_text(call.generate))
        reserved = await self.state.quotas.reserve(
            identity.tenant, identity.subject, decision, reserved_tokens(call.generate)
        )
        try:
            async with self.state.flights.watched(identity, exchange.action or "", receive):
                if call.generate.stream:
                    await self.stream(exchange, send, call, link, rendering)
                else:
                    await self.whole(exchange, identity, decision, send, call, link, rendering)
        except ApiError as error:
            if exchange.streaming:  # the slot is free already: a client that reads slowly holds nothing
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_SECONDS):
                        await send({"type": "http.response.body", "body": error_event(error)})
            raise
        finally:
            reserved.settle(exchange.tokens)
        seconds = time.monotonic() - exchange.started
        self.state.metrics.of(link.model).whole.observe(seconds)

    async def whole(
        self,
        exchange: Exchange,
        identity: Identity,
        decision: Decision,
        send: Send,
        call: Call,
        link: Seat,
        rendering: Rendering,
    ) -> None:
        """One body."""
        plain = call.generate.temperature == 0 and not call.generate.extra
        cache = self.state.cache if plain else None
        done, result = None, b"bypass"
        material = ""
        if cache:
            material = key_material(identity.tenant, decision.revision, link.hello, call.generate)
            done = await cache.get(material)
            result = b"hit" if done else b"miss"
        else:
            self.state.metrics.cache.labels("bypass").inc()
        if done is None:
            done = await self.ask_whole(call, link)
            exchange.tokens = done.prompt_tokens + done.completion_tokens
            if cache:
                await cache.put(material, done)
        self.count(exchange, link, done)
        await respond(send, 200, rendering.whole(done), [(b"x-llm-cache", result)])

    async def ask_whole(self, call: Call, link: Seat) -> Done:
        """The engine's answer; raises ApiError."""
        frame, _ = await self.ask(call, link)
        if isinstance(frame, Delta):
            raise RuntimeError("a piece of a stream nobody asked for")
        return frame

    async def ask(self, call: Call, link: Seat) -> tuple[Delta | Done, Answer]:
        """Wait for a slot, ask, and wait for the first frame; what has said nothing yet may be said elsewhere."""
        while True:
            before = time.monotonic()
            answer = await link.ask(call.generate, self.state.limits.queue_seconds)
            self.state.metrics.of(link.model).queue.observe(time.monotonic() - before)
            try:
                frame = await answer.get()
            except asyncio.CancelledError:
                link.cancel(call.generate.id)
                raise
            if not isinstance(frame, Failed):
                return frame, answer
            if not link.may_go_elsewhere(frame.code):
                raise failure(frame)

    async def stream(
        self, exchange: Exchange, send: Send, call: Call, link: Seat, rendering: Rendering
    ) -> None:
        """Server-sent events. What goes wrong before the first one is a plain error with its status."""
        frame, answer = await self.ask(call, link)
        try:
            exchange.streaming = True
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            await self.events(exchange, send, frame, answer, link, rendering)
        finally:
            link.cancel(call.generate.id)

    async def events(
        self,
        exchange: Exchange,
        send: Send,
        frame: Delta | Done,
        answer: Answer,
        link: Seat,
        rendering: Rendering,
    ) -> None:
        """From the first frame to [DONE]; every piece leaves at once."""
        then = time.monotonic()
        series = self.state.metrics.of(link.model)
        series.first_token.observe(then - exchange.started)
        opening = b"" if isinstance(frame, Event) else rendering.first()
        while isinstance(frame, Delta):
            said = rendering.event(frame) if isinstance(frame, Event) else rendering.piece(frame.text)
            if said:
                await send({"type": "http.response.body", "body": opening + said, "more_body": True})
                opening = b""
            exchange.tokens += 1  # until the engine says how many it were
            following = await answer.get()
            if isinstance(following, Failed):
                raise failure(following)
            frame = following
            now = time.monotonic()
            series.inter_token.observe(now - then)
            then = now
        exchange.tokens = frame.prompt_tokens + frame.completion_tokens
        self.count(exchange, link, frame)
        await send({"type": "http.response.body", "body": opening + rendering.last(frame)})

    def count(self, exchange: Exchange, link: Seat, done: Done) -> None:
        """Tokens, for metrics and the access log."""
        series = self.state.metrics.of(link.model)
        series.prompt_tokens.inc(done.prompt_tokens)
        series.completion_tokens.inc(done.completion_tokens)
        exchange.fields["gen_ai.usage.input_tokens"] = done.prompt_tokens
        exchange.fields["gen_ai.usage.output_tokens"] = done.completion_tokens
        exchange.fields["llm.finish_reason"] = done.finish_reason
