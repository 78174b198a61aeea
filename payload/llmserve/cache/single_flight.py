"""Single flight: an answer in progress serves all identical requests that arrive meanwhile.

It runs in its own task as long as at least one client listens. So the client that came first may disconnect or read slowly
without affecting the others. If the engine fails, only the first client receives the error, and the next one starts again.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from llmserve.api.errors import ApiError
from llmserve.cache.exact import ExactCache
from llmserve.metrics import Metrics
from llmserve.protocol import Delta, Done, Failed, Generate
from llmserve.upstream.admission import Place
from llmserve.upstream.engine_client import Answer
from llmserve.upstream.instances import RoutedRequest

log = logging.getLogger("llmserve.shared")


class Shared:
    """One answer in progress. Streams receive every piece, other listeners only the end."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.end: Done | Failed | None = None
        self.streams: dict[Answer, bool] = {}
        self.payer: Answer | None = None  # the first client's, as long as it listens; then the next one's
        self.request: Generate | None = None  # as the engine is asked; it has an id once it is sent
        self.task: asyncio.Task[None] | None = None

    def listen(self, stream: bool) -> Answer:
        """All frames, including those that have already come."""
        answer = Answer()
        if stream:
            for text in self.pieces:
                answer.put(Delta(0, text))
        if self.end:
            answer.put(self.end)
        self.streams[answer] = stream
        self.payer = self.payer or answer
        return answer

    def leave(self, answer: Answer) -> None:
        self.streams.pop(answer, None)
        if self.payer is answer and self.end is None:
            self.payer = next(iter(self.streams), None)

    def piece(self, frame: Delta) -> None:
        self.pieces.append(frame.text)
        for answer, stream in self.streams.items():
            if stream:
                answer.put(frame)

    def finish(self, end: Done | Failed) -> None:
        self.end = end
        if isinstance(end, Done):
            end.text = "".join(self.pieces)
        for answer in self.streams:
            answer.put(end)


@dataclass
class Listener:
    """One client's part in a shared answer. `first`: it caused the answer."""

    shared: Shared
    answer: Answer
    leave: Callable[[], None]
    first: bool

    @property
    def pays(self) -> bool:
        """Whether the answer's tokens count against this client's quota."""
        return self.shared.payer is self.answer


class SharedAnswers:
    """All answers in progress by cache key, which includes the tenant."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.running: dict[str, Shared] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def join(
        self,
        key: str,
        request: Generate,
        place: Callable[[], Place],
        routed: RoutedRequest,
        cache: ExactCache,
        fresh: bool,
    ) -> Listener:
        """Listen to the answer in progress, or start it.

        `fresh`: do not join an answer that was started before.
        """
        shared = None if fresh else self.running.get(key)
        first = shared is None
        if shared is None:
            shared = self.running[key] = Shared()
            shared.task = asyncio.create_task(self.make(key, shared, request, place(), routed, cache))
            self.tasks.add(shared.task)  # the event loop keeps only weak references
            shared.task.add_done_callback(self.tasks.discard)
        answer = shared.listen(request.stream)

        def leave() -> None:
            shared.leave(answer)
            if not shared.streams and shared.end is None and shared.task:
                self.forget(key, shared)
                shared.task.cancel()

        return Listener(shared, answer, leave, first)

    def forget(self, key: str, shared: Shared) -> None:
        """Prevent further requests from joining it."""
        if self.running.get(key) is shared:
            del self.running[key]

    async def make(
        self,
        key: str,
        shared: Shared,
        request: Generate,
        place: Place,
        routed: RoutedRequest,
        cache: ExactCache,
    ) -> None:
        """Run the request, pass its frames on, and cache the answer."""
        streamed = shared.request = replace(request, stream=True)
        frame: Delta | Done | Failed
        try:
            frame, answer = await routed.begin(streamed, place)
            self.metrics.of(routed.model).queue.observe(routed.queued)
            try:
                while isinstance(frame, Delta):
                    if frame.text:  # events of an upstream are passed on as text, because listeners render them differently
                        shared.piece(Delta(0, frame.text))
                    frame = await answer.get()
            finally:
                routed.cancel(streamed.id)
        except ApiError as error:
            frame = Failed(0, error.status, error.code, error.message, error.param)
        except Exception as error:
            log.exception("a shared answer failed")
            frame = Failed(0, 500, "internal_error", f"the gateway failed with {type(error).__name__}")
        if isinstance(frame, Failed):
            # Before the listeners are notified, so that the next request starts again.
            self.forget(key, shared)
            shared.finish(frame)
            return
        shared.finish(frame)
        try:
            await cache.put(key, shared.pieces, frame)
        finally:
            self.forget(key, shared)
