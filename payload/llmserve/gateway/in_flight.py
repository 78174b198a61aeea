"""Requests in flight, and the one way to cut them short: a client that left, an identity, a deadline, a drain."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmserve.access.identity import Authenticator, Identity
from llmserve.access.policy import Policy, denied
from llmserve.api.errors import ApiError, deadline_exceeded, unavailable
from llmserve.gateway.http_protocol import Peer
from llmserve.metrics import Metrics


class ClientGone(ApiError):
    """Nobody is there to be answered; 499 is what nginx calls it in its log."""

    def __init__(self) -> None:
        """The same for all."""
        super().__init__(499, "client_gone", "the client has closed the connection")


class InFlightRequest:
    """A request that is being answered by `task`."""

    def __init__(
        self,
        task: asyncio.Task[object],
        identity: Identity,
        action: str,
        ends: float,
        seconds: float,
        metrics: Metrics,
    ) -> None:
        """`action` as policy names it. `ends` (time.monotonic()) is the deadline of `seconds`."""
        self.task = task
        self.identity = identity
        self.action = action
        self.ends = ends
        self.seconds = seconds
        self.metrics = metrics
        self.interruption: ApiError | None = None

    def interrupt(self, error: ApiError) -> None:
        """Make the handler stop where it waits, and raise `error` there."""
        if self.interruption is None:
            self.interruption = error
            self.task.cancel()

    def client_gone(self) -> None:
        """The client has left."""
        self.metrics.cancelled.labels("client").inc()
        self.interrupt(ClientGone())


class InFlightRequests:
    """All of them."""

    def __init__(self, metrics: Metrics) -> None:
        """None yet."""
        self.metrics = metrics
        self.active: set[InFlightRequest] = set()

    @contextmanager
    def watched(
        self, peer: Peer, identity: Identity, action: str, ends: float, seconds: float
    ) -> Iterator[None]:
        """Run the block as a flight. It ends with an ApiError as soon as somebody interrupts it, or `peer` leaves.

        Its deadline of `seconds`, at `ends`, is looked at once a second.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a flight needs a task")
        request = InFlightRequest(task, identity, action, ends, seconds, self.metrics)
        self.active.add(request)
        try:
            peer.when_gone(request.client_gone)
            yield
        except asyncio.CancelledError:
            if request.interruption is None:
                raise
            task.uncancel()
            raise request.interruption from None
        finally:
            peer.stays()
            self.active.discard(request)

    def end_revoked(self, authenticator: Authenticator) -> None:
        """Interrupt what runs for identities that have ended: revoked, expired, or no longer known."""
        for request in list(self.active):
            if refusal := authenticator.ended(request.identity):
                self.metrics.cancelled.labels("key").inc()
                request.interrupt(refusal)

    async def end_denied(self, policy: Policy) -> None:
        """Interrupt what the policy does not allow any more."""
        for request in list(self.active):
            try:
                decision = await policy.decide(request.identity, request.action)
            except ApiError as unanswered:
                request.interrupt(unanswered)
                continue
            if not decision.allow:
                self.metrics.cancelled.labels("policy").inc()
                request.interrupt(denied(decision))

    def end_overdue(self) -> None:
        """Interrupt what runs longer than it may. The engine ends it by itself, unless it hangs."""
        now = time.monotonic()
        for request in list(self.active):
            if now > request.ends:
                self.metrics.cancelled.labels("deadline").inc()
                request.interrupt(deadline_exceeded(request.seconds))

    def end_all(self) -> None:
        """Interrupt everything: this process stops."""
        for request in list(self.active):
            self.metrics.cancelled.labels("drain").inc()
            request.interrupt(unavailable("draining", "this gateway is stopping: ask again", retry_after=5))
