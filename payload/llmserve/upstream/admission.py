"""Admission control of one engine: its slots and tokens are limited, a bounded queue waits, the rest is rejected.

Both limits count requests and tokens (an estimate of the prompt plus the longest possible answer). The queue is
ordered by priority, then by arrival. When it is full, a request of higher priority evicts the last one of the lowest
priority.
"""

import asyncio
import time
from bisect import insort
from dataclasses import dataclass, field
from itertools import count

from llmserve.api.errors import ApiError, deadline_exceeded, unavailable

numbers = count()


@dataclass(frozen=True, slots=True)
class Queue:
    """Capacity of a queue: requests, and tokens of all of them."""

    requests: int
    tokens: int


@dataclass(slots=True)
class Place:
    """What one request needs, and its place in the queue. `tokens`: prompt and answer; a higher `priority` goes
    first.

    It waits for `seconds` in total, in however many queues, and no longer than until `ends` (time.monotonic()).
    `deadline_seconds`: the deadline behind `ends` in seconds, for messages. `waited`: seconds waited so far.
    """

    seconds: float
    tokens: int = 0
    priority: int = 0
    ends: float | None = None
    deadline_seconds: float = 0.0
    waited: float = 0.0
    number: int = field(default_factory=lambda: next(numbers))
    turn: asyncio.Future[None] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sort key; the smallest is next."""
        return -self.priority, self.number


class Admission:
    """Slots of one engine, and the queue for them."""

    def __init__(self, room: Queue) -> None:
        """`slots` and `tokens` are set once the engine reports them; `tokens` 0 means unlimited."""
        self.slots = 0
        self.tokens = 0
        self.running = 0
        self.running_tokens = 0
        self.room = room
        self.waiting: list[Place] = []
        self.waiting_tokens = 0

    def fits(self, place: Place) -> bool:
        """Whether it may run now. A request larger than the engine's token capacity runs alone."""
        if self.running >= self.slots:
            return False
        return not self.tokens or not self.running or self.running_tokens + place.tokens <= self.tokens

    async def enter(self, place: Place) -> None:
        """Take a slot, waiting if necessary; raises ApiError 503. Each enter() needs one leave()."""
        if not self.waiting and self.fits(place):
            self.take(place)
            return
        self.make_room(place)
        turn = place.turn = asyncio.get_running_loop().create_future()
        insort(self.waiting, place, key=lambda each: each.order)
        self.waiting_tokens += place.tokens
        self.admit()
        began = time.monotonic()
        patience = seconds = place.seconds - place.waited
        if place.ends is not None:
            seconds = min(seconds, place.ends - began)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if place in self.waiting:
                self.forget(place)
                self.admit()  # the next in the queue may be small enough
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(place)  # the slot was granted just as the wait ended
            if not isinstance(error, TimeoutError):
                raise
            if seconds < patience:
                raise deadline_exceeded(place.deadline_seconds) from None
            raise unavailable(
                "queue_timeout",
                f"no slot became free within {place.seconds:g} s: retry later",
                retry_after=5,
            ) from None
        finally:
            place.waited += time.monotonic() - began

    def make_room(self, place: Place) -> None:
        """Make sure that `place` may wait, evicting requests of lower priority; raises ApiError 503."""
        while self.full(place):
            last = self.waiting[-1] if self.waiting else place
            if last.priority >= place.priority:
                raise self.overloaded()
            self.dismiss(last, self.overloaded())

    def dismiss(self, place: Place, refusal: ApiError) -> None:
        """Remove it from the queue; its enter() raises `refusal`."""
        self.forget(place)
        if place.turn and not place.turn.done():
            place.turn.set_exception(refusal)

    def call_in(self) -> None:
        """Admit everything that waits now, regardless of slots."""
        slots, self.slots = self.slots, self.running + len(self.waiting)
        self.admit()
        self.slots = slots

    def full(self, place: Place) -> bool:
        """Whether the queue has no room for it. An empty queue accepts one request of any length."""
        if len(self.waiting) >= self.room.requests:
            return True
        return bool(self.waiting) and self.waiting_tokens + place.tokens > self.room.tokens

    def overloaded(self) -> ApiError:
        return unavailable(
            "overloaded",
            f"{self.running} requests are running and {len(self.waiting)} are waiting with {self.waiting_tokens} tokens, "
            "which is the limit: retry later",
            retry_after=2,
        )

    def take(self, place: Place) -> None:
        self.running += 1
        self.running_tokens += place.tokens

    def forget(self, place: Place) -> None:
        self.waiting.remove(place)
        self.waiting_tokens -= place.tokens

    def leave(self, place: Place) -> None:
        """Release the slot, and admit what is next."""
        self.running -= 1
        self.running_tokens -= place.tokens
        self.admit()

    def admit(self) -> None:
        """Admit from the head of the queue. The head is never overtaken, so that long requests do not starve."""
        while self.waiting and self.fits(self.waiting[0]):
            place = self.waiting[0]
            self.forget(place)
            if place.turn and not place.turn.done():
                self.take(place)
                place.turn.set_result(None)
