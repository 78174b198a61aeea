"""Whether the process is alive, may be asked, and has answered all that it took."""

from llmserve.api.errors import unavailable
from llmserve.asgi import Receive, Scope, Send, json_body, respond
from llmserve.gateway.state import State


class Health:
    """For systemd, load balancers and people: is the process alive, may it be asked."""

    def __init__(self, state: State) -> None:
        """`state` is read at each question."""
        self.state = state

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 as long as the event loop turns."""
        await respond(send, 200, b'{"status":"alive"}')

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if a request would be answered now, else 503 and why not."""
        reasons = []
        if self.state.draining:
            reasons.append("this gateway is stopping")
        if self.state.authenticator.keys.records is None:
            reasons.append("the API keys cannot be read")
        if not self.state.policy.ready:
            reasons.append("no policy decides")
        if not self.state.audit.up:
            reasons.append("nothing can be recorded")
        # How many, not which: anybody may ask, and which models there are is for those who may use them.
        instances = self.state.instances.values()
        if absent := sum(each.hello is None for each in instances):
            reasons.append(f"{absent} of {len(instances)} engines are not there")
        if stalled := sum(each.hello is not None and not each.up for each in instances):
            reasons.append(f"{stalled} of {len(instances)} engines make no step")
        if reasons:
            raise unavailable("not_ready", "not ready: " + "; ".join(reasons))
        await respond(send, 200, json_body({"status": "ready"}))

    async def drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether this gateway stops, and how many answers it still owes: at 0 nothing is lost any more."""
        state = "draining" if self.state.draining else "serving"
        await respond(send, 200, json_body({"status": state, "in_flight": len(self.state.in_flight.active)}))
