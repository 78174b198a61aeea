"""Requests in flight, and how they end early: the client disconnects, the identity ends, a deadline, a drain."""

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
    """The client has disconnected; 499 is nginx's status for it."""

    def __init__(self) -> None:
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
        """`action` as the policy names it. `ends` (time.monotonic()) is the deadline of `seconds`."""
        self.task = task
        self.identity = identity
        self.action = action
        self.ends = ends
        self.seconds = seconds
        self.metrics = metrics
        self.interruption: ApiError | None = None

    def interrupt(self, error: ApiError) -> None:
        """Cancel the handler where it waits, and raise `error` there."""
        if self.interruption is None:
            self.interruption = error
            self.task.cancel()

    def client_gone(self) -> None:
        self.metrics.cancelled.labels("client").inc()
        self.interrupt(ClientGone())


class InFlightRequests:
    """All requests in flight in this process."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.active: set[InFlightRequest] = set()

    @contextmanager
    def watched(
        self, peer: Peer, identity: Identity, action: str, ends: float, seconds: float
    ) -> Iterator[None]:
        """Run the block as a request in flight. It ends with an ApiError when interrupted, or when `peer`
        disconnects.

        The deadline of `seconds`, at `ends`, is checked every second.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request in flight needs a task")
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
        """Interrupt requests whose identity has ended: revoked, expired, or no longer known."""
        for request in list(self.active):
            if refusal := authenticator.ended(request.identity):
                self.metrics.cancelled.labels("key").inc()
                request.interrupt(refusal)

    async def end_denied(self, policy: Policy) -> None:
        """Interrupt requests that the policy no longer allows."""
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
        """Interrupt requests past their deadline. The engine ends them itself, unless it hangs."""
        now = time.monotonic()
        for request in list(self.active):
            if now > request.ends:
                self.metrics.cancelled.labels("deadline").inc()
                request.interrupt(deadline_exceeded(request.seconds))

    def end_all(self) -> None:
        """Interrupt everything, because this process is stopping."""
        for request in list(self.active):
            self.metrics.cancelled.labels("drain").inc()
            request.interrupt(unavailable("draining", "this gateway is stopping: retry", retry_after=5))
