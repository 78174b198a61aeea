"""The source of an answer: the cache, an answer in progress that is shared, or a slot of its own."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange
from llmserve.cache.exact import CacheKey, CacheWish, ExactCache, Kept
from llmserve.cache.single_flight import SharedAnswers
from llmserve.metrics import Metrics
from llmserve.protocol import Delta, Done, Failed, Generate, Hello
from llmserve.upstream.admission import Place
from llmserve.upstream.engine_client import Answer
from llmserve.upstream.instances import RoutedRequest


def failure(frame: Failed) -> ApiError:
    """An engine's failure as an error for the client."""
    headers = [(b"retry-after", b"2")] if frame.status == 503 else []
    return ApiError(frame.status, frame.code, frame.message, frame.param, headers)


def text_only(request: Generate, hello: Hello) -> bool:
    """Whether the answer is plain text, so that it can be replayed from its pieces."""
    return hello.kept and not request.extra and request.inputs is None


class AnswerSource:
    """The source of one answer. Call `kept` first, then `begin`, and `close` in any case."""

    def __init__(
        self,
        exchange: Exchange,
        routed: RoutedRequest,
        request: Generate,
        place: Callable[[], Place],
        metrics: Metrics,
    ) -> None:
        """`place` creates the place in the engine's queue when it is needed."""
        self.exchange = exchange
        self.routed = routed
        self.request = request
        self.place = place
        self.metrics = metrics
        self.join: Callable[[Generate], tuple[Answer, Callable[[], None], bool]] | None = None
        self.answer: Answer
        self.close: Callable[[], None] = lambda: None
        self.ours = True  # this request caused the engine's work, so its tokens count against its quota

    async def kept(
        self, cache: ExactCache | None, shared: SharedAnswers, wish: CacheWish, key: Callable[[], CacheKey]
    ) -> Kept | None:
        """The cached answer, if the client may have it and `wish` permits it."""
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
        kept = await cache.get(where, wish.max_age) if wish.read else None
        if kept:
            self.exchange.cache = b"hit"
            self.metrics.cache_by["hit"].inc()
            return kept
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
                if self.ours or frame.status < 500:
                    raise failure(frame)
                self.close()
        finally:
            self.exchange.waited += time.monotonic() - before

    async def open(self) -> Delta | Done | Failed:
        """Wait for a slot and send the request, or join an identical one in progress; returns the first frame."""
        if self.join is None:
            frame, self.answer = await self.routed.begin(self.request, self.place())
            self.metrics.of(self.routed.model).queue.observe(self.routed.queued)
            self.close = partial(self.routed.cancel, self.request.id)
            return frame
        self.answer, self.close, self.ours = self.join(self.request)
        self.exchange.cache = b"miss" if self.ours else b"hit"
        self.metrics.cache_by["miss" if self.ours else "shared"].inc()
        return await self.answer.get()
