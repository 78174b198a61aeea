"""The hot routes: plain ASGI callables that answer prompts and embed texts."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

from llmserve.access.aliases import DEFAULT
from llmserve.access.experiments import OPENING
from llmserve.access.quotas import ANSWER_TOKENS
from llmserve.api.errors import ApiError, unavailable
from llmserve.api.requests import Call, refuse_beyond_context, refuse_other_work, refuse_undeclared
from llmserve.api.responses import EmbeddingRendering, GenerateRendering, OpenAiRendering, Rendering
from llmserve.api.responses_api_answer import ResponsesRendering
from llmserve.api.responses_api_request import ResponsesCall, renamed
from llmserve.asgi import Exchange, Receive, Scope, Send, header, respond
from llmserve.cache.exact import Kept, cache_wish
from llmserve.documents.rendering import GroundedRendering
from llmserve.gateway import parsed_requests
from llmserve.gateway.answer_source import AnswerSource, failure
from llmserve.gateway.http_protocol import Peer
from llmserve.gateway.parsed_requests import (
    BYTES_A_TOKEN,
    ParsedRequest,
    ParsedRequests,
    Read,
    read_body,
    seconds_allowed,
)
from llmserve.gateway.search import Search
from llmserve.gateway.shadows import Shadows
from llmserve.gateway.state import State, no_such_model
from llmserve.protocol import Choices, Delta, Done, Event, Failed, Generate, Hello
from llmserve.upstream.admission import Place
from llmserve.upstream.instances import RoutedRequest

LARGE_TEXT = 128 * 1024  # characters
UNDISCLOSED = "undisclosed"  # in place of an arm's revision, which would tell the arm
LAST_WORD_SECONDS = 5.0  # time to send the error event that ends a broken stream
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def collect(exchange: Exchange, text: str) -> None:
    """Note a piece of the answer if the answer may be kept, or the beginning of an arm's answer."""
    if exchange.answer is not None:
        exchange.answer.append(text)
    if exchange.assigned is not None and len(exchange.opening) < OPENING:
        exchange.opening = (exchange.opening + text[: 4 * OPENING]).lstrip()[:OPENING]


def answer_tokens(generate: Generate) -> int:
    """The tokens that an engine needs for the answer or answers, as far as the request tells."""
    longest = min(generate.max_tokens, ANSWER_TOKENS) if generate.clip else generate.max_tokens
    return longest * generate.answers


def render(rendering: Rendering, frame: Delta) -> bytes:
    """A piece of a stream; raises ApiError."""
    match frame:
        case Event():
            return rendering.event(frame)
        case Choices():
            return rendering.choices(frame)
        case _:
            return rendering.piece(frame.text)


def blind(scope: Scope) -> bool:
    """Whether the client must not learn which model answers."""
    return scope["llm"].assigned is not None


def blinded(error: ApiError, model: str, client_name: str) -> ApiError:
    """The error with the name that the client requested in place of the arm's."""
    return replace(error, message=error.message.replace(model, client_name))


class Completions:
    """The endpoints of models; they differ in how they parse the request and render the answer."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.parser = ParsedRequests(state.recorder.proof, state.cache_secret)
        self.shadows = Shadows(state)
        self.search = Search(state)

    def parse(self, scope: Scope, read: Read, body: bytes) -> ParsedRequest:
        exchange: Exchange = scope["llm"]
        granted = exchange.decision.max_tokens if exchange.decision else 0
        return self.parser.read(scope["llm"].identity.tenant, read, granted, body)

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        parsed = self.parse(scope, parsed_requests.chat, await read_body(scope, receive))
        if not parsed.call.collections and (names := self.state.collections(scope["llm"], parsed.call.model)):
            parsed = replace(parsed, call=replace(parsed.call, collections=names))
        if parsed.call.collections:
            await self.grounded(scope, send, parsed)
        else:
            await self.openai(True, parsed, scope, send)

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        parsed = self.parse(scope, parsed_requests.completion, await read_body(scope, receive))
        await self.openai(False, parsed, scope, send)

    async def openai(self, is_chat: bool, parsed: ParsedRequest, scope: Scope, send: Send) -> None:
        routed, hello = self.route(scope, parsed.call)
        rendering = OpenAiRendering(
            is_chat, self.issue(scope), hello.model, hello.revision, parsed.call.include_usage, blind(scope)
        )
        await self.answer(scope, send, parsed, routed, rendering)

    async def grounded(self, scope: Scope, send: Send, parsed: ParsedRequest) -> None:
        """Answer a chat from documents alone; if they contain nothing relevant to the question, no model is called."""
        call = parsed.call
        routed, hello = self.route(scope, call)
        grounding, about = await self.search.grounding(scope, call, routed)
        rendering = GroundedRendering(
            self.issue(scope), hello.model, hello.revision, call.include_usage, blind(scope), grounding
        )
        if grounding.hits:
            await self.answer(scope, send, parsed.grounded(grounding), routed, rendering, about)
            return
        exchange: Exchange = scope["llm"]
        await self.state.recorder.intent(exchange, None, parsed.content, parsed.proof, about)
        frame = Done(0, grounding.absent, "stop", 0, 0)
        if not call.generate.stream:
            await respond(send, 200, rendering.whole(frame))
            return
        exchange.streaming = True
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        body = rendering.first() + rendering.piece(frame.text) + rendering.last(frame)
        await send({"type": "http.response.body", "body": body})

    async def responses(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/responses: a chat in another format, including the field names in errors."""
        parsed = self.parse(scope, parsed_requests.responses, await read_body(scope, receive))
        call = parsed.call
        if not isinstance(call, ResponsesCall):
            raise RuntimeError("a request for this route must be parsed for it")
        try:
            routed, hello = self.route(scope, call)
            identifier = self.issue(scope)
            chat = OpenAiRendering(True, identifier, hello.model, hello.revision, include_usage=True)
            rendering = ResponsesRendering(chat, identifier, hello.model, call.repeated)
            await self.answer(scope, send, parsed, routed, rendering)
        except ApiError as error:
            raise renamed(error, call.names) from None

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET and POST /generate."""
        if scope["method"] == "GET":
            parsed = self.parse(scope, parsed_requests.queried, scope["query_string"])
        else:
            parsed = self.parse(scope, parsed_requests.posted, await read_body(scope, receive))
        routed, hello = self.route(scope, parsed.call)
        rendering = GenerateRendering(self.issue(scope), hello.model)
        await self.answer(scope, send, parsed, routed, rendering)

    async def embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/embeddings."""
        parsed = self.parse(scope, parsed_requests.embedding, await read_body(scope, receive))
        routed, hello = self.route(scope, parsed.call)
        await self.answer(scope, send, parsed, routed, EmbeddingRendering("", hello.model))

    def route(self, scope: Scope, call: Call) -> tuple[RoutedRequest, Hello]:
        """Route to the requested model, else to that of the alias `default`, else to the first permitted one; raises ApiError
        400, 404 or 503.

        Also returns the model name for the client: the requested name if the model is an arm of an experiment.
        """
        visible = self.state.visible(scope["llm"])
        client_name = call.model
        if client_name is None:
            client_name = DEFAULT if DEFAULT in scope["llm"].decision.aliases else next(iter(visible), "")
        name = self.state.resolve(scope["llm"], client_name)
        if not call.collections and self.state.collections(scope["llm"], client_name):
            message = (
                f"'{client_name}' answers from documents: use /v1/chat/completions, or the model '{name}'"
            )
            raise ApiError(404, "wrong_endpoint", message, "model")
        if name not in visible:
            if name in self.state.instances:  # not the client's own words, and not for its eyes
                scope["llm"].fields["gen_ai.request.model"] = name
            raise no_such_model(name, visible, client_name)
        routed = self.of_arm(scope["llm"], name, call.generate)
        if routed is None:
            if name not in self.state.instances:  # the name of an experiment, where vectors are wanted
                raise no_such_model(name, [each for each in visible if each in self.state.instances])
            routed = self.state.instances[name].route(scope["llm"].identity.tenant, call.generate)
        refuse_undeclared(call.generate, name, routed.hello, lambda: self.state.declared(visible))
        refuse_other_work(call.generate, routed.hello.dimensions, call.dimensions)
        refuse_beyond_context(call.generate, name, routed.hello.context)
        if scope["llm"].assigned:
            return routed, replace(routed.hello, model=name, revision=UNDISCLOSED)
        return routed, routed.hello

    def of_arm(self, exchange: Exchange, name: str, generate: Generate) -> RoutedRequest | None:
        """Route to an arm if the policy has an experiment about `name` for this tenant; raises ApiError 503.

        The control replaces a candidate that is not up, even one that is expected back, and one that was halted on this host or
        is not watched. Embeddings are never assigned, since vectors of two models cannot be compared.
        """
        identity, decision = exchange.identity, exchange.decision
        experiment = decision.experiment(name) if decision else None
        if identity is None or experiment is None or generate.inputs is not None:
            return None
        assigned = exchange.assigned = experiment.assign(identity, exchange.transaction)
        if assigned.arm == "candidate":
            candidate = self.state.instances.get(experiment.candidate)
            away = self.state.halts.reason(experiment)
            if not away and candidate is not None and candidate.up:
                return candidate.route(identity.tenant, generate)
            exchange.assigned = replace(assigned, away=away or "down")
        try:
            if experiment.control in self.state.instances:
                return self.state.instances[experiment.control].route(identity.tenant, generate)
        except ApiError as error:
            raise blinded(error, experiment.control, name) from None
        message = f"the engine of '{name}' is unavailable: retry in a few seconds"
        raise unavailable("engine_unavailable", message, retry_after=2)

    def issue(self, scope: Scope) -> str:
        """The answer's id, and whether its text is collected, which the tenant's policy decides."""
        exchange: Exchange = scope["llm"]
        if exchange.identity is None or exchange.decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        exchange.response_id = self.state.ratings.ids.issue(exchange.transaction, exchange.identity)
        if exchange.decision.keep_prompts and self.state.ratings.journal:
            exchange.answer = []
        return exchange.response_id

    async def answer(
        self,
        scope: Scope,
        send: Send,
        parsed: ParsedRequest,
        routed: RoutedRequest,
        rendering: Rendering,
        about: dict[str, object] | None = None,
    ) -> None:
        """Answer from the cache or from the engine, whole or streamed. `about`: further fields of the audit record."""
        exchange: Exchange = scope["llm"]
        identity, decision = exchange.identity, exchange.decision
        if identity is None or decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        exchange.model = routed.model
        call = parsed.call
        if self.state.draining:
            raise unavailable("draining", "this gateway is stopping: retry", retry_after=5)
        seconds = seconds_allowed(scope, self.state.limits.answer_seconds)
        exchange.hurried = seconds < self.state.limits.answer_seconds
        if len(parsed.text) > LARGE_TEXT:
            await asyncio.sleep(0)  # answers of others come between its validation and its redaction
        await self.state.recorder.intent(exchange, routed.model, parsed.content, parsed.proof, about)
        texts = len(call.generate.inputs or (1,))
        prompt_tokens = min(max(1, len(parsed.text.encode()) // BYTES_A_TOKEN), texts * routed.hello.context)
        expected = prompt_tokens + answer_tokens(call.generate)
        answers = call.generate.answers
        reserved = await self.state.quotas.reserve(
            identity.tenant, identity.subject, decision, prompt_tokens, call.generate.max_tokens, answers
        )
        self.state.ratings.assigned(exchange)
        ends = exchange.started + seconds
        tokens = min(expected, routed.hello.context)

        def place() -> Place:
            """A place in the queue; time spent waiting for a shared answer counts as time in the queue."""
            waited = time.monotonic() - exchange.started
            patience = max(0.0, self.state.limits.queue_seconds - waited)
            return Place(
                patience,
                tokens,
                decision.rate.priority,
                ends,
                seconds,
                identity.tenant,
                identity.subject,
                decision.weight,
            )

        source = AnswerSource(exchange, routed, call.generate, place, self.state.metrics, prompt_tokens)
        ended: BaseException | None = None
        try:
            with self.state.in_flight.watched(scope["peer"], identity, exchange.action or "", ends, seconds):
                wish = cache_wish(header(scope, b"cache-control"))
                key = partial(parsed.key, identity.tenant, decision.revision, routed.hello)
                hit = await source.cached_answer(self.state.cache, self.state.shared, wish, key)
                if hit:
                    await self.replay(exchange, send, call, routed, rendering, hit)
                elif call.generate.stream:
                    await self.stream(exchange, send, scope["peer"], routed, rendering, source)
                else:
                    await self.whole(exchange, send, routed, rendering, source)
        except ApiError as error:
            ended = error
            if exchange.assigned:
                error = blinded(error, routed.model, exchange.assigned.model)
            # The slot is released already, so a client that reads slowly blocks nothing.
            if exchange.streaming:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORD_SECONDS):
                        await send({"type": "http.response.body", "body": rendering.error(error)})
            raise error
        except BaseException as error:
            ended = error
            raise
        finally:
            reserved.settle(sum(source.usage), source.usage[1] // answers)
            if source.usage != (0, 0):  # an answer that ended early is on the record, too
                exchange.fields.setdefault("gen_ai.usage.input_tokens", source.usage[0])
                exchange.fields.setdefault("gen_ai.usage.output_tokens", source.usage[1])
            self.state.ratings.ended(exchange, ended)
        self.state.metrics.of(routed.model).whole.observe(time.monotonic() - exchange.started)
        self.shadows.consider(exchange, parsed, tokens)
        self.state.ratings.answered(exchange, routed.hello.revision, parsed.content, call.generate.extra)

    async def replay(
        self,
        exchange: Exchange,
        send: Send,
        call: Call,
        routed: RoutedRequest,
        rendering: Rendering,
        hit: Kept,
    ) -> None:
        """Send a cached answer; a stream gets the same pieces that the engine produced."""
        frame = hit.frame
        self.count(exchange, routed, frame)
        collect(exchange, frame.text)
        age = (b"age", b"%d" % hit.age())
        if not call.generate.stream:
            await respond(send, 200, rendering.whole(frame), [age])
            return
        exchange.streaming = True
        await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, age]})
        self.state.metrics.of(routed.model).first_token.observe(time.monotonic() - exchange.started)
        opening = rendering.first()
        body = b"".join([opening, *map(rendering.piece, hit.pieces), rendering.last(frame)])
        await send({"type": "http.response.body", "body": body})

    async def whole(
        self,
        exchange: Exchange,
        send: Send,
        routed: RoutedRequest,
        rendering: Rendering,
        source: AnswerSource,
    ) -> None:
        """Send the answer as one body."""
        try:
            frame = await source.begin()
        finally:
            source.close()
        if isinstance(frame, Delta):
            raise RuntimeError("a piece of a stream in an answer that is not streamed")
        exchange.first = time.monotonic()
        self.count(exchange, routed, frame)
        collect(exchange, frame.text)
        await respond(send, 200, rendering.whole(frame))

    async def stream(
        self,
        exchange: Exchange,
        send: Send,
        peer: Peer,
        routed: RoutedRequest,
        rendering: Rendering,
        source: AnswerSource,
    ) -> None:
        """Send server-sent events. An error before the first one becomes a plain response with its status."""
        try:
            frame = await source.begin()
            exchange.first = time.monotonic()
            exchange.streaming = True
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            await self.events(exchange, send, peer, frame, source, routed, rendering)
        finally:
            source.close()

    async def events(
        self,
        exchange: Exchange,
        send: Send,
        peer: Peer,
        frame: Delta | Done | Failed,
        source: AnswerSource,
        routed: RoutedRequest,
        rendering: Rendering,
    ) -> None:
        """From the first frame to [DONE]; every piece is sent at once."""
        then = exchange.first
        series = self.state.metrics.of(routed.model)
        series.first_token.observe(then - exchange.started)
        opening = b"" if isinstance(frame, Event | Choices) else rendering.first()

        def observe() -> None:
            nonlocal then
            now = time.monotonic()
            series.inter_token.observe(now - then)
            then = now

        def take(frame: Delta | Done | Failed) -> bool:
            """Send a piece that arrives while this coroutine waits for it."""
            client = peer.protocol
            if not isinstance(frame, Delta) or client is None or not client.takes_chunks:
                return False
            observe()
            source.noted(frame)
            collect(exchange, frame.text)
            if rendered := render(rendering, frame):
                client.write_chunk(rendered)
            return True

        while isinstance(frame, Delta):
            collect(exchange, frame.text)
            if rendered := render(rendering, frame):
                await send({"type": "http.response.body", "body": opening + rendered, "more_body": True})
                opening = b""
                if isinstance(rendering, OpenAiRendering):  # others refuse pieces, which `take` must not
                    source.answer.take = take
            frame = await source.next()
            observe()
        if isinstance(frame, Failed):
            raise failure(frame)
        self.count(exchange, routed, frame)
        await send({"type": "http.response.body", "body": opening + rendering.last(frame)})

    def count(self, exchange: Exchange, routed: RoutedRequest, frame: Done) -> None:
        """Record token counts for metrics and the access log."""
        series = self.state.metrics.of(routed.model)
        series.prompt_tokens.inc(frame.prompt_tokens)
        series.completion_tokens.inc(frame.completion_tokens)
        exchange.fields["gen_ai.usage.input_tokens"] = frame.prompt_tokens
        exchange.fields["gen_ai.usage.output_tokens"] = frame.completion_tokens
        exchange.fields["llm.finish_reason"] = frame.finish_reason
