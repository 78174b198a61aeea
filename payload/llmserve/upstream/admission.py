"""Admission control of one engine: its slots and tokens are limited, a bounded queue waits, the rest is rejected.

Requests of a higher priority go first. Among equals, tenants are served in turn by deficit round robin (Shreedhar and
Varghese, 1995): a turn is worth QUANTUM tokens times the tenant's weight, and what is left of it is carried over, so
that tenants that wait get tokens, not requests, in the proportion of their weights, as with the virtual token counter
of Sheng et al. (2024), but at a cost that does not grow with the queue. Subjects of a tenant are served in turn, and
the requests of a subject in order of arrival.

A tenant or subject has at most a fixed share of the slots and tokens that run. Of the queue it has at most a multiple
of what is still free (Choudhury and Hahne, 1998), so that the queue has room for a newcomer; a request beyond that is
rejected with 429. A single request is always within its bounds.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from llmserve.api.errors import ApiError, deadline_exceeded, unavailable

numbers = count()
QUANTUM = 256  # tokens of a turn: about one answer of the default length
# Tokens that may wait, unless configured: contexts of the model, since every subject may queue a prompt that fills one.
WAITING_CONTEXTS, LEAST_WAITING = 4, 262144
# Of the free part of the queue. Alone, a subject can fill half of the queue, and a tenant of weight 1 two thirds.
SUBJECT_QUEUE, TENANT_QUEUE = 1, 2


@dataclass(slots=True)
class Queue:
    """Capacity of a model's queues: requests, and tokens of all of them (None: by its context); and the shares of what
    runs that one subject and one tenant may have. `context`: as its engine last reported it; 0 before.
    """

    requests: int
    tokens: int | None
    subject_share: float = 1.0
    tenant_share: float = 1.0
    context: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that may wait."""
        return self.tokens or max(LEAST_WAITING, WAITING_CONTEXTS * self.context)


@dataclass(slots=True)
class Place:
    """What one request is expected to need, and its place in the queue. `tokens`: prompt and answer; a higher `priority` goes
    first.

    It waits for `seconds` in total, in however many queues, and no longer than until `ends` (time.monotonic()).
    `deadline_seconds`: the deadline behind `ends` in seconds, for messages. `waited`: seconds waited so far.
    """

    seconds: float
    tokens: int = 1
    priority: int = 0
    ends: float | None = None
    deadline_seconds: float = 0.0
    tenant: str = ""
    subject: str = ""
    weight: int = 1  # of the tenant
    waited: float = 0.0
    number: int = field(default_factory=lambda: next(numbers))
    turn: asyncio.Future[None] | None = None
    holders: tuple[str, tuple[str, str]] = field(init=False)  # its tenant and its subject, as keys of `Loads`

    def __post_init__(self) -> None:
        self.holders = self.tenant, (self.tenant, self.subject)


@dataclass(slots=True)
class Load:
    """A number of requests, and the tokens of all of them."""

    requests: int = 0
    tokens: int = 0


class Loads:
    """The load of all, and of each tenant and each subject that has any."""

    def __init__(self) -> None:
        self.total = Load()
        self.by: dict[str | tuple[str, str], Load] = {}

    def of(self, holder: str | tuple[str, str]) -> Load:
        return self.by.get(holder) or Load()

    def add(self, place: Place) -> None:
        self.change(place, 1)

    def remove(self, place: Place) -> None:
        self.change(place, -1)

    def change(self, place: Place, sign: int) -> None:
        self.total.requests += sign
        self.total.tokens += sign * place.tokens
        for holder in place.holders:
            load = self.by.get(holder)
            if load is None:
                load = self.by[holder] = Load()
            load.requests += sign
            load.tokens += sign * place.tokens
            if not load.requests:
                del self.by[holder]


@dataclass(slots=True)
class Tenant:
    """The waiting requests of one tenant and priority, by subject and number. `credit`: tokens left of its turn."""

    credit: int
    subjects: OrderedDict[str, OrderedDict[int, Place]] = field(default_factory=OrderedDict)


class Admission:
    """Slots of one engine, and the queue for them."""

    def __init__(self, room: Queue) -> None:
        """`slots` and `tokens` are set once the engine reports them; `tokens` 0 means unlimited."""
        self.slots = 0
        self.tokens = 0
        self.room = room
        self.running = Loads()
        self.waiting = Loads()
        self.queues: dict[int, OrderedDict[str, Tenant]] = {}  # by priority; the first tenant is next

    async def enter(self, place: Place) -> None:
        """Take a slot, waiting if necessary; raises ApiError 429 or 503. Each enter() needs one leave()."""
        if not self.waiting.total.requests and self.within_shares(place) and self.fits(place):
            self.running.add(place)
            return
        self.make_room(place)
        turn = place.turn = asyncio.get_running_loop().create_future()
        self.append(place)
        self.admit()
        began = time.monotonic()
        patience = seconds = place.seconds - place.waited
        if place.ends is not None:
            seconds = min(seconds, place.ends - began)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if place in self:
                self.remove(place)
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

    def leave(self, place: Place, used: int = 0) -> None:
        """Release the slot, and admit what is next. Tokens that were `used` beyond those of `place` are taken off the
        tenant's turn.
        """
        self.running.remove(place)
        if tenant := self.queued(place):
            tenant.credit -= max(0, used - place.tokens)
        self.admit()

    def admit(self) -> None:
        """Admit from the head of the queue. The head is never overtaken, so that long requests do not starve."""
        while (place := self.head()) and self.fits(place):
            tenant = self.queues[place.priority][place.tenant]
            tenant.credit -= place.tokens
            tenant.subjects.move_to_end(place.subject)
            self.grant(place)

    def head(self) -> Place | None:
        """The request whose turn it is, of tenants and subjects that are within their shares; None without a free slot."""
        if self.running.total.requests >= self.slots:
            return None
        for priority in sorted(self.queues, reverse=True):
            tenants = self.queues[priority]
            while place := next(filter(None, map(self.first, tenants.values())), None):
                tenant = tenants[place.tenant]
                if tenant.credit >= place.tokens:
                    return place
                tenant.credit += QUANTUM * place.weight
                tenants.move_to_end(place.tenant)
        return None

    def first(self, tenant: Tenant) -> Place | None:
        """The tenant's next request, if the tenant is within its share. No other of its subjects overtakes this one."""
        for requests in tenant.subjects.values():
            place = next(iter(requests.values()))
            if self.within_share(place, place.holders[1], self.room.subject_share):
                return place if self.within_share(place, place.tenant, self.room.tenant_share) else None
        return None

    def fits(self, place: Place) -> bool:
        """Whether the engine has room for it now. A request larger than its token capacity runs alone."""
        running = self.running.total
        if running.requests >= self.slots:
            return False
        return not self.tokens or not running.requests or running.tokens + place.tokens <= self.tokens

    def within_shares(self, place: Place) -> bool:
        tenant, subject = place.holders
        return self.within_share(place, subject, self.room.subject_share) and self.within_share(
            place, tenant, self.room.tenant_share
        )

    def within_share(self, place: Place, holder: str | tuple[str, str], share: float) -> bool:
        """Whether `holder` has no more than `share` of the engine once `place` runs, too."""
        load = self.running.of(holder)
        if not load.requests:
            return True
        if load.requests + 1 > share * self.slots:
            return False
        return not self.tokens or load.tokens + place.tokens <= share * self.tokens

    def make_room(self, place: Place) -> None:
        """Make sure that `place` may wait, evicting requests of lower priority; raises ApiError 429 or 503."""
        tenant, subject = place.holders
        self.refuse_beyond(place, subject, SUBJECT_QUEUE, "you have")
        self.refuse_beyond(place, tenant, TENANT_QUEUE * place.weight, "your tenant has")
        while self.full(place):
            last = self.last()
            if last is None or last.priority >= place.priority:
                raise self.overloaded()
            self.dismiss(last, self.overloaded())

    def refuse_beyond(self, place: Place, holder: str | tuple[str, str], factor: int, who: str) -> None:
        """Raise ApiError 429 if `holder` would have more than `factor` times what is then free of the queue."""
        queue, total, room = self.waiting.of(holder), self.waiting.total, self.room
        if not queue.requests:
            return
        if (
            queue.requests + 1 > factor * (room.requests - total.requests - 1)
            or queue.tokens + place.tokens > factor * (room.capacity - total.tokens - place.tokens)
        ):  # fmt: skip
            message = f"{who} {queue.requests} requests waiting with {queue.tokens} tokens: retry later"
            raise ApiError(429, "too_many_waiting", message, headers=[(b"retry-after", b"2")])

    def full(self, place: Place) -> bool:
        """Whether the queue has no room for it. An empty queue accepts one request of any length."""
        waiting = self.waiting.total
        if waiting.requests >= self.room.requests:
            return True
        return bool(waiting.requests) and waiting.tokens + place.tokens > self.room.capacity

    def overloaded(self) -> ApiError:
        running, waiting = self.running.total, self.waiting.total
        return unavailable(
            "overloaded",
            f"{running.requests} requests are running and {waiting.requests} are waiting with {waiting.tokens} tokens, "
            "which is the limit: retry later",
            retry_after=2,
        )

    def queued(self, place: Place) -> Tenant | None:
        """What waits of its tenant and priority."""
        tenants = self.queues.get(place.priority)
        return tenants.get(place.tenant) if tenants else None

    def append(self, place: Place) -> None:
        """Queue it behind the others of its subject; a new tenant or subject comes last."""
        tenants = self.queues.setdefault(place.priority, OrderedDict())
        tenant = tenants.setdefault(place.tenant, Tenant(QUANTUM * place.weight))
        tenant.subjects.setdefault(place.subject, OrderedDict())[place.number] = place
        self.waiting.add(place)

    def remove(self, place: Place) -> None:
        """Take it out of the queue, with its subject, tenant and priority if nothing else of theirs waits."""
        tenants = self.queues[place.priority]
        subjects = tenants[place.tenant].subjects
        del subjects[place.subject][place.number]
        if not subjects[place.subject]:
            del subjects[place.subject]
        if not subjects:
            del tenants[place.tenant]
        if not tenants:
            del self.queues[place.priority]
        self.waiting.remove(place)

    def grant(self, place: Place) -> None:
        """Let it run; its enter() returns, unless its wait has just ended."""
        self.remove(place)
        if place.turn and not place.turn.done():
            self.running.add(place)
            place.turn.set_result(None)

    def dismiss(self, place: Place, refusal: ApiError) -> None:
        """Remove it from the queue; its enter() raises `refusal`."""
        self.remove(place)
        if place.turn and not place.turn.done():
            place.turn.set_exception(refusal)

    def call_in(self) -> None:
        """Admit everything that waits now, regardless of slots."""
        for place in list(self):
            self.grant(place)

    def last(self) -> Place | None:
        """A waiting request of the lowest priority: the last one of the subject and tenant that were served most recently."""
        if not self.queues:
            return None
        tenant = next(reversed(self.queues[min(self.queues)].values()))
        return next(reversed(next(reversed(tenant.subjects.values())).values()))

    def __iter__(self) -> Iterator[Place]:
        """Everything that is waiting, by priority."""
        for priority in sorted(self.queues, reverse=True):
            for tenant in self.queues[priority].values():
                for requests in tenant.subjects.values():
                    yield from requests.values()

    def __contains__(self, place: Place) -> bool:
        tenant = self.queued(place)
        return tenant is not None and place.number in tenant.subjects.get(place.subject, ())
