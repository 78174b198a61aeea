"""Liveness, readiness, and the state of a drain."""

from llmserve.api.errors import unavailable
from llmserve.asgi import Receive, Scope, Send, json_body, respond
from llmserve.gateway.state import State


class Health:
    """Health endpoints for systemd, load balancers and people."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 while the event loop runs."""
        await respond(send, 200, b'{"status":"alive"}')

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if a request would be answered now; otherwise raises ApiError 503 with the reasons."""
        reasons = []
        if self.state.draining:
            reasons.append("this gateway is stopping")
        if self.state.authenticator.keys.records is None:
            reasons.append("the API keys cannot be read")
        if not self.state.policy.ready:
            reasons.append("the policy is unavailable")
        if not self.state.audit.up:
            reasons.append("the audit writer is unavailable")
        # Counts rather than names: this route is public, and the models' names are only for clients that may use them.
        instances = self.state.instances.values()
        if absent := sum(each.hello is None for each in instances):
            reasons.append(f"{absent} of {len(instances)} engines are unavailable")
        if stalled := sum(each.hello is not None and not each.up for each in instances):
            reasons.append(f"{stalled} of {len(instances)} engines make no progress")
        # Requests are answered all the same; a balancer of several hosts is to prefer another one.
        if not reasons and (sick := sum(each.sick for each in instances)):
            raise unavailable(
                "quarantined", f"{sick} of {len(instances)} engines run on quarantined GPUs only"
            )
        if reasons:
            raise unavailable("not_ready", "not ready: " + "; ".join(reasons))
        await respond(send, 200, json_body({"status": "ready"}))

    async def drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether this gateway is stopping, and the number of answers in flight; at 0 it can be killed without loss."""
        state = "draining" if self.state.draining else "serving"
        await respond(send, 200, json_body({"status": state, "in_flight": len(self.state.in_flight.active)}))
