"""Requests in flight: a disconnected client ends them, and they leave nothing behind."""

import asyncio
import gc

import pytest

from llmserve.access.identity import Identity
from llmserve.gateway.http_protocol import Peer
from llmserve.gateway.in_flight import ClientGone, InFlightRequests
from llmserve.metrics import Metrics

WHO = Identity("api_key", "1", "ada", "research", ("developer",))


async def run_for(in_flight: InFlightRequests, peer: Peer, seconds: float) -> None:
    """A request that takes `seconds`."""
    with in_flight.watched(peer, WHO, "POST /generate", 1e9, 60):
        await asyncio.sleep(seconds)


@pytest.mark.parametrize("before", [True, False], ids=["before it flies", "while it flies"])
def test_a_disconnected_client_ends_its_request(before: bool) -> None:
    async def scenario() -> None:
        peer, in_flight = Peer(), InFlightRequests(Metrics())
        if before:
            peer.leave()
        else:
            asyncio.get_running_loop().call_later(0.01, peer.leave)
        with pytest.raises(ClientGone):
            await run_for(in_flight, peer, 60)
        assert not in_flight.active

    asyncio.run(scenario())


def test_a_client_that_disconnects_after_its_answer_ends_nothing() -> None:
    async def scenario() -> None:
        peer, in_flight = Peer(), InFlightRequests(Metrics())
        await run_for(in_flight, peer, 0)
        peer.leave()
        await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_request_leaves_nothing_to_the_garbage_collector() -> None:
    async def scenario() -> None:
        in_flight = InFlightRequests(Metrics())
        gc.collect()
        gc.disable()
        try:
            await asyncio.gather(*(run_for(in_flight, Peer(), 0.001) for _ in range(50)))
            assert gc.collect() == 0
        finally:
            gc.enable()

    asyncio.run(scenario())
