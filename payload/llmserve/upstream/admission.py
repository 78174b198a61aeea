"""Who may run now: what the engine has slots and room for; a bounded number waits; the rest is told to come back.

Both bounds count requests and tokens (the prompt's estimate and the longest answer). Who waits is served by priority,
then in the order of arrival. Where the queue is full, one of a higher priority takes the place of the last of the lowest.
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
    """Room to wait: requests, and tokens of all of them."""

    requests: int
    tokens: int


@dataclass(slots=True)
class Place:
    """What one request needs. `tokens`: prompt and answer; a higher `priority` goes first.

    It waits for `seconds`, in as many queues as it takes, and not beyond `ends` (time.monotonic()); `asked` is the deadline
    behind `ends`, for people. `waited`: seconds of the former.
    """

    seconds: float
    tokens: int = 0
    priority: int = 0
    ends: float | None = None
    asked: float = 0.0
    waited: float = 0.0
    number: int = field(default_factory=lambda: next(numbers))
    turn: asyncio.Future[None] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """The smallest is the next."""
        return -self.priority, self.number


class Admission:
    """Slots of one engine."""

    def __init__(self, room: Queue) -> None:
        """`slots` and `tokens` are set when the engine says how many it has; no `tokens` is no bound."""
        self.slots = 0
        self.tokens = 0
        self.running = 0
        self.running_tokens = 0
        self.room = room
        self.waiting: list[Place] = []
        self.waiting_tokens = 0

    def fits(self, place: Place) -> bool:
        """Whether it may run now. What is larger than all the engine has room for runs alone."""
        if self.running >= self.slots:
            return False
        return not self.tokens or not self.running or self.running_tokens + place.tokens <= self.tokens

    async def enter(self, place: Place) -> None:
        """Take a slot, waiting if need be; raises ApiError 503. Each enter needs one leave()."""
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
                self.admit()  # who waited behind it may be small enough
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(place)  # the slot came in the very moment in which we gave up
            if not isinstance(error, TimeoutError):
                raise
            if seconds < patience:
                raise deadline_exceeded(place.asked) from None
            raise unavailable(
                "queue_timeout",
                f"no slot became free within {place.seconds:g} s: ask again later",
                retry_after=5,
            ) from None
        finally:
            place.waited += time.monotonic() - began

    def make_room(self, place: Place) -> None:
        """Return if `place` may wait; raises ApiError 503."""
        while self.full(place):
            last = self.waiting[-1] if self.waiting else place
            if last.priority >= place.priority:
                raise self.overloaded()
            self.dismiss(last, self.overloaded())

    def dismiss(self, place: Place, refusal: ApiError) -> None:
        """It waits no more, and is told why."""
        self.forget(place)
        if place.turn and not place.turn.done():
            place.turn.set_exception(refusal)

    def call_in(self) -> None:
        """Let all in who wait now, slots or not."""
        slots, self.slots = self.slots, self.running + len(self.waiting)
        self.admit()
        self.slots = slots

    def full(self, place: Place) -> bool:
        """Whether the queue has no room for it. An empty queue takes one request of any length."""
        if len(self.waiting) >= self.room.requests:
            return True
        return bool(self.waiting) and self.waiting_tokens + place.tokens > self.room.tokens

    def overloaded(self) -> ApiError:
        """503."""
        return unavailable(
            "overloaded",
            f"{self.running} requests run and {len(self.waiting)} wait already, with {self.waiting_tokens} tokens, "
            "which is the limit: ask again later",
            retry_after=2,
        )

    def take(self, place: Place) -> None:
        """It runs."""
        self.running += 1
        self.running_tokens += place.tokens

    def forget(self, place: Place) -> None:
        """It waits no more."""
        self.waiting.remove(place)
        self.waiting_tokens -= place.tokens

    def leave(self, place: Place) -> None:
        """Give the slot to the next who waits."""
        self.running -= 1
        self.running_tokens -= place.tokens
        self.admit()

    def admit(self) -> None:
        """Let in who may run now. None overtakes the first, so that a long request is not passed by for ever."""
        while self.waiting and self.fits(self.waiting[0]):
            place = self.waiting[0]
            self.forget(place)
            if place.turn and not place.turn.done():
                self.take(place)
                place.turn.set_result(None)
