"""The source of an answer: the cache, an answer in progress that is shared, or a slot of its own."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange
from llmserve.cache.exact import CacheWish, ExactCache, Kept
from llmserve.cache.single_flight import Listener, SharedAnswers
from llmserve.metrics import Metrics
from llmserve.protocol import Delta, Done, Failed, Generate, Hello
from llmserve.upstream.admission import Place
from llmserve.upstream.engine_client import Answer
from llmserve.upstream.instances import RoutedRequest


def failure(frame: Failed) -> ApiError:
    """An engine's failure as an error for the client."""
    headers = [(b"retry-after", b"2")] if frame.status in {429, 503} else []
    return ApiError(frame.status, frame.code, frame.message, frame.param, headers)


def text_only(request: Generate, hello: Hello) -> bool:
    """Whether the answer is plain text, so that it can be replayed from its pieces."""
    return hello.kept and not request.extra and request.inputs is None


class AnswerSource:
    """The source of one answer. Call `cached_answer` first, then `begin`, and `close` in any case."""

    def __init__(
        self,
        exchange: Exchange,
        routed: RoutedRequest,
        request: Generate,
        place: Callable[[], Place],
        metrics: Metrics,
        prompt_tokens: int,
    ) -> None:
        """`place` creates the place in the engine's queue when it is needed. `prompt_tokens`: an estimate."""
        self.exchange = exchange
        self.routed = routed
        self.request = request
        self.place = place
        self.metrics = metrics
        self.prompt_tokens = prompt_tokens
        self.join: Callable[[Generate], Listener] | None = None
        self.listener: Listener | None = None
        self.answer = Answer()
        self.leave: Callable[[], None] = lambda: None
        self.pieces = 0  # of an answer that is not shared
        self.end: Done | Failed | None = None
        self.usage = (
            0,
            0,
        )  # once closed: prompt and completion tokens that count against this request's quota

    async def cached_answer(
        self, cache: ExactCache | None, shared: SharedAnswers, wish: CacheWish, key: Callable[[], str]
    ) -> Kept | None:
        """The cached answer, if the client may have it and `wish` allows it."""
        if (
            cache is None
            or not wish.write
            or not (self.request.temperature == 0 or wish.max_age)
            or not text_only(self.request, self.routed.hello)
        ):
            self.exchange.cache = b"bypass"
            self.metrics.cache_by["bypass"].inc()
            return None
        where = key()
        answer = await cache.get(where, wish.max_age) if wish.read else None
        if answer:
            self.exchange.cache = b"hit"
            self.metrics.cache_by["hit"].inc()
            return answer
        self.join = partial(
            shared.join, where, place=self.place, routed=self.routed, cache=cache, fresh=not wish.read
        )
        return None

    async def begin(self) -> Delta | Done:
        """The first frame; raises ApiError. If a shared answer failed, this request goes to the engine itself."""
        before = time.monotonic()
        # A copy, since identical requests share the parsed one.
        self.request = replace(self.request, traceparent=self.exchange.traceparent.decode())
        try:
            while True:
                frame = await self.open()
                if not isinstance(frame, Failed):
                    return frame
                ours = frame.status < 500 and frame.status != 429  # that is the first subject's own bound
                if self.listener is None or self.listener.first or ours:
                    raise failure(frame)
                self.leave()
        finally:
            self.exchange.waited += time.monotonic() - before

    async def open(self) -> Delta | Done | Failed:
        """Wait for a slot and send the request, or join an identical one in progress; returns the first frame."""
        if self.join is None:
            self.leave = lambda: self.routed.cancel(self.request.id)
            try:
                frame, self.answer = await self.routed.begin(self.request, self.place())
            except ApiError as error:
                self.end = Failed(0, error.status, error.code, error.message)
                raise
            self.metrics.of(self.routed.model).queue.observe(self.routed.queued)
            return self.noted(frame)
        listener = self.listener = self.join(self.request)
        self.answer, self.leave = listener.answer, listener.leave
        self.exchange.cache = b"miss" if listener.first else b"hit"
        self.metrics.cache_by["miss" if listener.first else "shared"].inc()
        return self.noted(await self.answer.get())

    async def next(self) -> Delta | Done | Failed:
        """The frame after the first one."""
        return self.noted(await self.answer.get())

    def noted(self, frame: Delta | Done | Failed) -> Delta | Done | Failed:
        if isinstance(frame, Delta):
            self.pieces += 1
        else:
            self.end = frame
        return frame

    def close(self) -> None:
        """Stop listening, and the engine's work if no one else listens; sets `usage`. Calling it again changes nothing."""
        if self.leave is not no_op:
            self.usage = self.spent()
            self.answer.take = None
            self.leave()
            self.leave = no_op

    def spent(self) -> tuple[int, int]:
        """Prompt and completion tokens. An answer that ends early costs its prompt and every token that was generated; one that
        is not streamed, whose tokens are not seen, costs as many as it may have had.
        """
        while self.answer.frames:  # generated, though a slow client has not read it
            self.noted(self.answer.frames.popleft())
        request, pieces, end = self.request, self.pieces, self.end
        if self.listener:
            if not self.listener.pays:
                return 0, 0
            shared = self.listener.shared
            request, pieces, end = shared.request or request, len(shared.pieces), shared.end
        if isinstance(end, Done):
            return end.prompt_tokens, end.completion_tokens
        lost = isinstance(end, Failed) and end.code != "deadline_exceeded" and not pieces
        if lost or not request.id:  # the engine's fault, or never sent to one
            return 0, 0
        room = max(0, self.routed.hello.context - self.prompt_tokens)
        return self.prompt_tokens, pieces if request.stream else min(
            request.max_tokens, room
        ) * request.answers


def no_op() -> None:
    """`leave` for a source that is closed."""
