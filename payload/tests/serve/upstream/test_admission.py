"""Admission: what runs, what waits, and what is rejected."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection

import pytest

from llmserve.api.errors import ApiError
from llmserve.upstream.admission import LEAST_WAITING, QUANTUM, Admission, Load, Place, Queue


def admission(slots: int, waiting: int = 100, tokens: int = 0, waiting_tokens: int = 10**6) -> Admission:
    """The admission of an engine that has reported its capacity."""
    it = Admission(Queue(waiting, waiting_tokens))
    it.slots, it.tokens = slots, tokens
    return it


def in_order(it: Admission, places: list[Place], leaving: Collection[int] = ()) -> list[int | str]:
    """The order in which `places`, requested in this order, ran; those in `leaving` give up while they wait."""

    async def scenario() -> list[int | str]:
        order: list[int | str] = []

        async def visit(number: int, place: Place) -> None:
            try:
                await it.enter(place)
            except ApiError as refused:
                order.append(f"{number} {refused.code}")
                return
            order.append(number)
            try:
                await asyncio.sleep(0.001)
            finally:
                it.leave(place)

        visits = [asyncio.create_task(visit(number, place)) for number, place in enumerate(places)]
        await asyncio.sleep(0)
        for number in leaving:
            visits[number].cancel()
        await asyncio.gather(*visits, return_exceptions=True)
        assert (it.running.by, it.waiting.by, it.queues) == ({}, {}, {})
        return order

    return asyncio.run(scenario())


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it in an event loop."""

    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_requests_run_in_order_of_arrival_and_no_slot_is_lost() -> None:
    places = [Place(5, tokens=3) for _ in range(30)]
    assert in_order(admission(2), places, range(10, 20)) == [*range(10), *range(20, 30)]


def test_a_higher_priority_runs_first_and_equals_run_in_order() -> None:
    priorities = [1, 1, 5, 1, 9, 5]
    assert in_order(admission(1), [Place(5, priority=each) for each in priorities]) == [0, 4, 2, 5, 1, 3]


def test_a_full_queue_refuses_at_once() -> None:
    assert in_order(admission(1, waiting=0), [Place(5), Place(5)]) == [0, "1 overloaded"]


def test_a_queue_is_limited_in_tokens_but_accepts_one_request_of_any_length() -> None:
    places = [Place(5, tokens=each, tenant=f"t{each}") for each in (1, 500, 2)]
    assert in_order(admission(1, waiting_tokens=100), places) == [0, "2 overloaded", 1]


def test_a_queue_without_a_configured_size_holds_four_contexts_of_its_model() -> None:
    it = Admission(Queue(100, None, context=131072))
    it.slots = 1
    subjects = [("a", "ada"), ("a", "ada"), ("a", "ada"), ("b", "bob"), ("c", "cy"), ("d", "dee")]
    places = [Place(5, tokens=131072, tenant=tenant, subject=subject) for tenant, subject in subjects]
    assert sorted(map(str, in_order(it, places))) == ["0", "1", "2", "3", "4", "5 overloaded"]
    assert Queue(100, None).capacity == Queue(100, None, context=2048).capacity == LEAST_WAITING
    assert Queue(100, 7, context=131072).capacity == 7


def test_in_a_full_queue_a_higher_priority_evicts_the_last_of_the_lowest() -> None:
    priorities = [0, 1, 1, 5]
    places = [Place(5, priority=each, tenant=f"t{number}") for number, each in enumerate(priorities)]
    assert in_order(admission(1, waiting=2), places) == [0, "2 overloaded", 3, 1]
    equals = [Place(5, priority=5, tenant=f"t{number}") for number in range(3)]
    assert in_order(admission(1, waiting=1), equals) == [0, "2 overloaded", 1]


def test_tenants_are_served_in_turn_and_their_subjects_in_turn() -> None:
    flood = [Place(5, tokens=256, tenant="a", subject="ada") for _ in range(4)]
    others = [("a", "alan"), ("b", "bob"), ("b", "bob")]
    places = flood + [Place(5, tokens=256, tenant=tenant, subject=subject) for tenant, subject in others]
    assert in_order(admission(1), places) == [0, 1, 5, 4, 6, 2, 3]


def test_turns_are_worth_tokens_not_requests() -> None:
    large = [Place(5, tokens=512, tenant="a") for _ in range(3)]
    small = [Place(5, tokens=64, tenant="b") for _ in range(17)]
    order = in_order(admission(1), [*large, *small])
    assert order.index(2) - order.index(1) == 9, "eight small ones have the tokens of a large one"


def test_a_subject_and_a_tenant_leave_slots_to_others() -> None:
    async def scenario() -> None:
        it = Admission(Queue(100, 10**6, subject_share=0.5, tenant_share=0.75))
        it.slots = 8
        visits = [
            asyncio.create_task(it.enter(Place(5, tenant=tenant, subject=subject)))
            for tenant, subject in [("a", "ada")] * 6 + [("a", "alan")] * 6 + [("b", "bob")]
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running = {holder: load.requests for holder, load in it.running.by.items()}
        assert running == {"a": 6, ("a", "ada"): 4, ("a", "alan"): 2, "b": 1, ("b", "bob"): 1}
        for visit in visits:
            visit.cancel()

    run(scenario)


def test_a_subject_that_fills_its_part_of_the_queue_is_refused_with_429_and_others_wait() -> None:
    places = [Place(5, subject="ada") for _ in range(41)]
    places += [Place(5, subject="alan"), Place(5, tenant="b")]
    order = in_order(admission(1, waiting=64), places)
    refused = [f"{number} too_many_waiting" for number in range(33, 41)]
    assert order[:9] == [0, *refused]
    assert {41, 42} <= set(order)


def test_running_tokens_are_limited_and_a_request_beyond_the_limit_runs_alone() -> None:
    async def scenario() -> None:
        it = admission(10, tokens=100)
        small, large = Place(5, tokens=60), Place(5, tokens=1000)
        await it.enter(small)
        entering = asyncio.create_task(it.enter(large))
        behind = asyncio.create_task(it.enter(Place(5, tokens=1)))
        await asyncio.sleep(0)
        assert not entering.done(), "60 of 100 tokens are running"
        assert not behind.done(), "a short request must not overtake a long one"
        it.leave(small)
        await entering
        assert not behind.done()
        it.leave(large)
        await behind
        assert it.running.total == Load(1, 1)

    run(scenario)


def test_waiting_ends_at_the_queue_limit_or_the_deadline_of_the_request() -> None:
    async def scenario() -> None:
        it = admission(1)
        await it.enter(Place(5))
        for place, code in (
            (Place(0.02), "queue_timeout"),
            (Place(5, ends=time.monotonic() + 0.02, deadline_seconds=0.02), "deadline_exceeded"),
            (Place(5, ends=time.monotonic() - 1, deadline_seconds=0.02), "deadline_exceeded"),
        ):
            with pytest.raises(ApiError) as refused:
                await it.enter(place)
            assert (refused.value.status, refused.value.code) == (503, code)
            assert dict(refused.value.headers)[b"retry-after"]
        assert (it.waiting.by, it.queues) == ({}, {})

    run(scenario)


def test_a_cancelled_head_of_the_queue_admits_the_next_that_fits() -> None:
    async def scenario() -> None:
        it = admission(10, tokens=100)
        await it.enter(Place(5, tokens=60))
        large = asyncio.create_task(it.enter(Place(5, tokens=90)))
        small = asyncio.create_task(it.enter(Place(5, tokens=10)))
        await asyncio.sleep(0)
        large.cancel()
        await asyncio.wait_for(small, 4)

    run(scenario)


def test_a_tenant_that_uses_more_than_it_reserved_waits_longer_for_its_next_turn() -> None:
    """Both reserve as many tokens, and the answers of the first use four times as many."""
    it = admission(1)

    async def scenario() -> None:
        order: list[str] = []

        async def visit(place: Place) -> None:
            await it.enter(place)
            order.append(place.tenant)
            await asyncio.sleep(0)
            it.leave(place, 4 * QUANTUM if place.tenant == "long" else QUANTUM)

        first = Place(5, QUANTUM, tenant="other")
        await it.enter(first)
        visits = [
            asyncio.create_task(visit(Place(5, QUANTUM, tenant=tenant)))
            for _ in range(8)
            for tenant in ("long", "short")
        ]
        await asyncio.sleep(0)
        it.leave(first)
        await asyncio.gather(*visits)
        assert order[:10].count("long") == 2

    run(scenario)
