"""Properties of admission over random arrivals, ends and cancellations."""

import asyncio
import math
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.api.errors import ApiError
from llmserve.upstream.admission import (
    QUANTUM,
    SUBJECT_QUEUE,
    TENANT_QUEUE,
    Admission,
    Load,
    Place,
    Queue,
    numbers,
)

ROOM = Queue(12, 4000, subject_share=0.5, tenant_share=0.75)
LARGEST = 1200  # tokens of a request
WEIGHTS = {"a": 1, "b": 3, "c": 1}

arrivals = st.builds(
    lambda holder, tokens, priority: Place(
        60, tokens, priority, tenant=holder[0], subject=holder, weight=WEIGHTS[holder[0]]
    ),
    st.sampled_from(["ada", "alan", "bob", "cleo"]),
    st.integers(1, LARGEST),
    st.sampled_from([0, 5]),
)
# An arrival, or the end of one that is there (a number, modulo their count), whether it runs or waits.
steps = st.lists(st.one_of(arrivals, st.integers(0, 100)), max_size=60)


class Visitors:
    """Requests that have entered; `order` lists those that ran."""

    def __init__(self, it: Admission) -> None:
        self.it = it
        self.tasks: dict[int, tuple[Place, asyncio.Task[None]]] = {}
        self.order: list[Place] = []

    async def arrive(self, place: Place) -> None:
        task = asyncio.create_task(self.enter(place))
        self.tasks[place.number] = place, task
        await settle()
        if task.done():
            del self.tasks[place.number]
            refused = task.exception()
            assert isinstance(refused, ApiError)
            assert refused.status == 429 or self.it.full(place), "503 only where the queue is full"

    async def enter(self, place: Place) -> None:
        await self.it.enter(place)
        self.order.append(place)
        try:
            await asyncio.Event().wait()
        finally:
            self.it.leave(place)

    async def end(self, number: int) -> None:
        _, task = self.tasks.pop(list(self.tasks)[number % len(self.tasks)])
        task.cancel()
        await settle()

    def drop_evicted(self) -> None:
        self.tasks = {number: each for number, each in self.tasks.items() if not each[1].done()}


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def check(it: Admission, visitors: Visitors) -> None:
    """Every invariant that holds between two steps."""
    visitors.drop_evicted()
    waiting = list(it)
    here = [place for place, _ in visitors.tasks.values()]
    running = [place for place in here if place not in it]
    assert sorted(place.number for place in waiting) == sorted(place.number for place in here if place in it)
    for loads, places in (it.running, running), (it.waiting, waiting):
        counted: dict[object, Load] = {}
        for place in places:
            for holder in place.holders:
                load = counted.setdefault(holder, Load())
                load.requests += 1
                load.tokens += place.tokens
        assert loads.by == counted, "nothing is left of those that are gone"
        assert loads.total == Load(len(places), sum(place.tokens for place in places))
    total = it.running.total
    assert total.requests <= it.slots
    assert total.tokens <= it.tokens or total.requests == 1
    for holder, load in it.running.by.items():
        share = ROOM.subject_share if isinstance(holder, tuple) else ROOM.tenant_share
        within = load.requests <= share * it.slots and load.tokens <= share * it.tokens
        assert within or load.requests == 1, holder
    assert it.waiting.total.requests <= ROOM.requests
    head = it.head()
    assert head is None or not it.fits(head), "work-conserving"
    assert all(subjects for tenants in it.queues.values() for subjects in tenants.values())


@given(steps, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_no_slot_idles_and_whatever_waits_is_served(steps: list[Place | int], slots: int) -> None:
    async def scenario() -> None:
        it = Admission(ROOM)
        it.slots, it.tokens = slots, 2000
        visitors = Visitors(it)
        for step in steps:
            if isinstance(step, Place):
                before = {holder: it.waiting.of(holder).requests for holder in step.holders}
                await visitors.arrive(like(step))
                tenant, subject = step.holders
                free = ROOM.requests - it.waiting.total.requests
                for holder, factor in (subject, SUBJECT_QUEUE), (tenant, TENANT_QUEUE * step.weight):
                    now = it.waiting.of(holder).requests
                    assert now <= max(1, before[holder], factor * free)
            elif visitors.tasks:
                await visitors.end(step)
            check(it, visitors)
        while visitors.tasks:  # the first that runs ends; all that wait must get their turn
            ran = next(at for at, (place, _) in enumerate(visitors.tasks.values()) if place not in it)
            await visitors.end(ran)
            check(it, visitors)
        assert (it.running.by, it.waiting.by, it.queues) == ({}, {}, {})

    asyncio.run(scenario())


def like(place: Place) -> Place:
    """Another request of the same size and subject."""
    return replace(place, number=next(numbers), turn=None)


@given(st.lists(st.integers(1, LARGEST), min_size=4, max_size=4), st.integers(1, LARGEST), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_no_flood_delays_a_neighbour_by_more_than_its_turns(
    sizes: list[int], tokens: int, weight: int
) -> None:
    """The bound of deficit round robin: other tenants get the turns that the neighbour's request takes, and one more."""

    async def scenario() -> None:
        it = Admission(Queue(10**6, 10**9))
        it.slots = 1
        visitors = Visitors(it)
        flooding = [Place(60, size, tenant=str(at), weight=weight) for at, size in enumerate(sizes)]
        for place in flooding * 10:
            await visitors.arrive(like(place))
        begun = len(visitors.order)
        victim = Place(60, tokens, tenant="victim")
        await visitors.arrive(victim)
        while victim in it:
            await visitors.end(
                next(at for at, each in enumerate(visitors.tasks.values()) if each[0] not in it)
            )
            ran = visitors.order[-1]
            if ran is not victim:
                await visitors.arrive(like(ran))  # the flood does not end
        served = Counter[str]()
        for place in visitors.order[begun:]:
            served[place.tenant] += place.tokens
        del served["victim"]
        turns = math.ceil(tokens / QUANTUM)
        for tenant, used in served.items():
            assert used <= (turns + 1) * weight * QUANTUM + LARGEST, (tenant, served)
        for _, task in visitors.tasks.values():
            task.cancel()

    asyncio.run(scenario())
