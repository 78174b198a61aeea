"""Admission: what runs, what waits, and what is rejected."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection

import pytest

from llmserve.api.errors import ApiError
from llmserve.upstream.admission import Admission, Place, Queue


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
        assert (it.running, it.running_tokens, len(it.waiting), it.waiting_tokens) == (0, 0, 0, 0)
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
    places = [Place(5, tokens=each) for each in (1, 500, 1)]
    assert in_order(admission(1, waiting_tokens=100), places) == [0, "2 overloaded", 1]


def test_in_a_full_queue_a_higher_priority_evicts_the_last_of_the_lowest() -> None:
    places = [Place(5), Place(5, priority=1), Place(5, priority=1), Place(5, priority=5)]
    assert in_order(admission(1, waiting=2), places) == [0, "2 overloaded", 3, 1]
    equals = [Place(5, priority=5) for _ in range(3)]
    assert in_order(admission(1, waiting=1), equals) == [0, "2 overloaded", 1]


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
        assert it.running_tokens == 1

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
        assert (it.waiting, it.waiting_tokens) == ([], 0)

    run(scenario)


def test_a_cancelled_head_of_the_queue_admits_the_next_that_fits() -> None:
    async def scenario() -> None:
        it = admission(10, tokens=100)
        await it.enter(Place(5, tokens=60))
        large = asyncio.create_task(it.enter(Place(5, tokens=90)))
        small = asyncio.create_task(it.enter(Place(5, tokens=10)))
        await asyncio.sleep(0)
        large.cancel()
        await asyncio.wait_for(small, 1)

    run(scenario)
