"""Requests as events of the audit record, with the names of ECS (https://www.elastic.co/guide/en/ecs/current/)."""

import hmac
import time
from functools import partial

from llmserve.access.experiments import Assigned
from llmserve.asgi import Exchange
from llmserve.audit.redact import redact
from llmserve.audit.refusals import Refusals, source
from llmserve.audit.writer_client import AuditClient


def phase(name: str, kind: str, outcome: str) -> dict[str, object]:
    """Kinds that distinguish the records of one exchange."""
    return {"llmkeep.audit.phase": name, "event.type": [kind], "event.outcome": outcome}


def of_arm(assigned: Assigned) -> dict[str, object]:
    """The recorded fields of an assignment to an arm. `away`: why the control answered in the candidate's place. `shadow`: the
    transaction of which this is a copy.
    """
    fields: dict[str, object] = {
        "llmkeep.experiment.name": assigned.experiment,
        "llmkeep.experiment.arm": assigned.arm,
        "llmkeep.experiment.percent": assigned.percent,
    }
    if assigned.away:
        fields["llmkeep.experiment.away"] = assigned.away
    if assigned.shadow:
        fields["llmkeep.experiment.shadow"] = assigned.shadow
    return fields


INTENT = phase("intent", "access", "unknown")
SUCCESS, FAILURE = phase("outcome", "access", "success"), phase("outcome", "access", "failure")
REFUSED = phase("refused", "denied", "failure")


def refused(exchange: Exchange) -> bool:
    """Whether the request was refused because of its content or its caller; every 4xx status of a known caller counts."""
    if exchange.public or exchange.status == 499:  # the client has left
        return False
    return exchange.status in {401, 403, 429} or (
        exchange.identity is not None and 400 <= exchange.status < 500
    )


class Recorder:
    """Records the intent and the outcome of each exchange."""

    def __init__(self, writer: AuditClient, pepper: bytes) -> None:
        """The pepper keys the prompts' hashes, so that a short prompt cannot be guessed from the record."""
        self.writer = writer
        note = partial(writer.note, refusal=True)
        # Strangers write at most 2.7 MB an hour, callers at most 14 MB, which takes 256 of them.
        self.strangers = Refusals(note, sources=32, singly=1, records=32)
        self.callers = Refusals(note, sources=256, singly=3, records=128)
        self.key = hmac.digest(pepper, b"llmkeep audit prompt", "sha256")

    def proof(self, prompt: str) -> str:
        """The record's hash of a prompt."""
        return hmac.digest(self.key, prompt.encode(), "sha256").hex()

    async def intent(
        self,
        exchange: Exchange,
        model: str | None = None,
        content: object = None,
        proof: str = "",
        about: dict[str, object] | None = None,
    ) -> None:
        """Record the request that is about to be answered; raises ApiError 503 if that is not possible.

        `content`: the prompt, messages or inputs, if the request has any; `proof`: the hash of its text. `about`: further fields
        of intent and outcome.
        """
        exchange.recorded = self.event(exchange) | (about or {})
        event = exchange.recorded | INTENT
        if model is not None:
            event["gen_ai.request.model"] = model
        if content is not None:
            event["llmkeep.prompt.hmac"] = proof
            if exchange.decision and exchange.decision.log_prompt:
                event["llmkeep.prompt.text"] = redact(content)
        await self.writer.record(event)
        exchange.intended = True

    def close(self, exchange: Exchange, nanoseconds: int) -> None:
        """Record how the exchange ended if it began, else that it was refused. Public routes leave no record."""
        if exchange.intended:
            failed = exchange.code is not None or exchange.status >= 400
            event = exchange.recorded | (FAILURE if failed else SUCCESS)
            for name in ("input_tokens", "output_tokens"):
                if f"gen_ai.usage.{name}" in exchange.fields:
                    event[f"gen_ai.usage.{name}"] = exchange.fields[f"gen_ai.usage.{name}"]
        elif refused(exchange):
            event = self.event(exchange) | REFUSED
            if "gen_ai.request.model" in exchange.fields:
                event["gen_ai.request.model"] = exchange.fields["gen_ai.request.model"]
        else:
            return
        event["http.response.status_code"] = exchange.status
        event["event.duration"] = nanoseconds
        if exchange.code is not None:
            event["error.code"] = exchange.code
        if exchange.intended:
            self.writer.note(event)
        else:
            refusals = self.callers if exchange.identity else self.strangers
            refusals.add(event, source(exchange), time.monotonic())

    def tick(self) -> None:
        """Record the refusals that were counted in the last full minute."""
        self.strangers.tick(time.monotonic())
        self.callers.tick(time.monotonic())

    def flush(self) -> None:
        """Record the refusals that were counted so far, because this process stops."""
        self.strangers.flush()
        self.callers.flush()

    def event(self, exchange: Exchange) -> dict[str, object]:
        """The caller, the action, and the rule that allowed it."""
        event: dict[str, object] = {
            "event.kind": "event",
            "event.category": ["api"],
            "event.action": exchange.action or "unknown",
            "transaction.id": exchange.transaction,
            "http.request.id": exchange.request_id.decode(),
            "url.path": exchange.route,
        }
        if exchange.address:
            event["source.ip"] = exchange.address
        identity, decision = exchange.identity, exchange.decision
        if identity:
            event["user.id"] = identity.subject
            # Those of a token's groups are the policy's to name.
            event["user.roles"] = list(decision.roles if decision and decision.roles else identity.roles)
            event["organization.id"] = identity.tenant
            event["llmkeep.identity.kind"] = identity.kind
            event["llmkeep.identity.id"] = identity.id
        if decision:
            event["llmkeep.decision.id"] = decision.id
            event["llmkeep.decision.rule"] = decision.rule
            event["llmkeep.decision.revision"] = decision.revision
        if exchange.assigned:
            event |= of_arm(exchange.assigned)
        return event
