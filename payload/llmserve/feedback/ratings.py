"""`POST /v1/feedback`: a user's rating of an answer."""

import time
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from llmcore.ratings import (
    ANSWERER,
    ARM_FIELD,
    FIELD,
    OUTGOING,
    RESPONSE_ID,
    SUBJECT,
    TENANT,
    TIME,
    TRANSACTION,
)
from llmserve.access.experiments import Assigned
from llmserve.api.errors import ApiError
from llmserve.api.requests import parse_body
from llmserve.api.response_models import Shape
from llmserve.asgi import Exchange
from llmserve.audit.recorder import of_arm
from llmserve.feedback.journal import Journal
from llmserve.feedback.response_ids import ResponseIds
from llmserve.metrics import Metrics

Reason = Literal[
    "wrong", "incomplete", "irrelevant", "harmful", "refused", "too_long", "too_short", "style", "other"
]
Text = Annotated[str, Field(min_length=1, max_length=4000)]
ENGINE_REFUSED = "engine_refused"  # a request that the other arm's engine may well take
LONGEST = 50_000  # characters of an exchange that is kept


def required_field(name: str) -> JsonDict:
    """In JSON Schema: the field is present and not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


ONE_RATING: JsonDict = {
    "anyOf": [required_field(name) for name in ("thumb", "stars", "correction")],
    "not": {"allOf": [required_field(name) for name in ("thumb", "stars")]},
}


class FeedbackBody(BaseModel):
    """A rating. `id`: the answer's header `x-llm-response-id`; or the id in its body, unless a remote engine produced the
    body."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=ONE_RATING)
    id: Annotated[str, Field(min_length=1, max_length=100)]
    thumb: Literal["up", "down"] | None = None
    stars: Annotated[int, Field(ge=1, le=5)] | None = None
    reason: Reason | None = None
    comment: Text | None = None
    correction: Text | None = None

    @model_validator(mode="after")
    def says_one_thing(self) -> "FeedbackBody":
        """A thumb and stars might contradict each other."""
        if self.thumb is None and self.stars is None and self.correction is None:
            raise ValueError("set 'thumb', 'stars' or 'correction'")
        if self.thumb is not None and self.stars is not None:
            raise ValueError("both 'thumb' and 'stars' are set: send one of them")
        return self


class Feedback(Shape):
    """Response of POST /v1/feedback. `text_kept`: whether comment and correction were kept, which the tenant's policy decides."""

    object: Literal["feedback"]
    id: str
    text_kept: bool


class Ratings:
    """Accepts ratings, and the answers of tenants that consent, if there is a journal."""

    def __init__(self, ids: ResponseIds, journal: Journal | None, metrics: Metrics) -> None:
        self.ids = ids
        self.journal = journal
        self.metrics = metrics

    async def rate(self, exchange: Exchange, body: bytes) -> Feedback:
        """Keep a rating; raises ApiError 400, 404, 410 or 503. A later rating of the same answer replaces it."""
        identity, decision = exchange.identity, exchange.decision
        if identity is None or decision is None:
            raise RuntimeError("this route must be behind authentication and policy")
        feedback = parse_body(FeedbackBody, body)
        answered = self.ids.verify(feedback.id, identity)
        if self.journal is None:
            raise ApiError(503, "feedback_unavailable", "this gateway keeps no ratings: ask its operator")
        record: dict[str, object] = {
            TIME: now(),
            TRANSACTION: answered.transaction,
            "event.created": datetime.fromtimestamp(answered.issued, UTC).isoformat(),
            SUBJECT: identity.subject,
            TENANT: identity.tenant,
        }
        for name in "thumb", "stars", "reason":
            if (value := getattr(feedback, name)) is not None:
                record[FIELD + name] = value
        if feedback.correction is not None:
            record[FIELD + "corrected"] = True  # also where its text is not kept
        if decision.keep_prompts:
            for name in "comment", "correction":
                if (text := getattr(feedback, name)) is not None:
                    record[FIELD + name] = text
        if answered.host in self.ids.others:  # its journal has what was answered, and gets this
            await self.journal.rate(record | {ANSWERER: answered.host, RESPONSE_ID: feedback.id}, OUTGOING)
        else:
            await self.journal.rate(record)
        self.metrics.rated(feedback.thumb or "none", feedback.stars or 0)
        return Feedback(object="feedback", id=feedback.id, text_kept=decision.keep_prompts)

    def answered(self, exchange: Exchange, revision: str, prompt: object, extra: object) -> None:
        """Keep an answer and its prompt, if its text was collected and the model ended it itself.

        Answers to requests with `extra` fields such as tools, which text cannot represent, are left out, as are very long ones:
        finding personal data in them takes too long, and they do not fit into a row of training data.
        """
        if exchange.answer is None or exchange.identity is None or self.journal is None:
            return
        # A remote engine's text may have halves of surrogate pairs.
        answer = "".join(exchange.answer).encode(errors="replace").decode()
        ended = exchange.fields.get("llm.finish_reason") == "stop"
        if extra or not ended or not answer.strip() or len(answer) + len(str(prompt)) > LONGEST:
            return
        self.journal.answered(
            {
                TIME: now(),
                TRANSACTION: exchange.transaction,
                SUBJECT: exchange.identity.subject,
                TENANT: exchange.identity.tenant,
                "event.action": exchange.action,
                "llm.model": exchange.model,
                "llm.revision": revision,
                FIELD + "prompt": prompt,
                FIELD + "answer": answer,
            }
        )

    def assigned(self, exchange: Exchange) -> None:
        """Keep which arm of an experiment answers: without text, so it needs no consent; with the subject, so that it can be
        forgotten.

        Assignments that cannot be compared are left out, for example once all units have the candidate.
        """
        if exchange.assigned and exchange.assigned.compares and self.journal:
            self.journal.assigned(of_unit(exchange, exchange.assigned))

    def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        """Keep how an engine answered for an arm, without text, for the guardrails.

        Answers that did not come from an engine of the arm are left out: those from the cache, of which the larger arm has more,
        and those of the control in the candidate's place.
        """
        assigned = exchange.assigned
        if not assigned or not assigned.counts or not self.journal or exchange.cache == b"hit":
            return
        record = of_unit(exchange, assigned)
        tokens = exchange.fields.get("gen_ai.usage.output_tokens")
        failed = error is not None and (
            (error.status >= 500 and not (exchange.hurried and error.code == "deadline_exceeded"))
            or error.code == ENGINE_REFUSED
            if isinstance(error, ApiError)
            else isinstance(error, Exception)
        )
        # Of a client that left, or an answer that failed, before the first byte: it took longer than this.
        record[ARM_FIELD + "seconds"] = round((exchange.first or time.monotonic()) - exchange.started, 4)
        record[ARM_FIELD + "failed"] = failed
        if error is None:
            opening = exchange.opening.casefold()
            record[ARM_FIELD + "refused"] = exchange.fields.get(
                "llm.finish_reason"
            ) == "content_filter" or opening.startswith(assigned.refusals)
            if tokens is not None:
                record[ARM_FIELD + "tokens"] = tokens
        self.journal.ended(record)

    async def settled(self) -> None:
        """Wait until everything is kept."""
        if self.journal is not None:
            await self.journal.settled()


def of_unit(exchange: Exchange, assigned: Assigned) -> dict[str, object]:
    """The exchange's holder, its arm, and its experiment, whose `id` changes with its salt."""
    if exchange.identity is None:
        raise RuntimeError("this route must be behind authentication and policy")
    return {
        TIME: now(),
        TRANSACTION: exchange.transaction,
        SUBJECT: exchange.identity.subject,
        TENANT: exchange.identity.tenant,
        **of_arm(assigned),
        ARM_FIELD + "id": assigned.id,
        ARM_FIELD + "unit": assigned.unit,
        ARM_FIELD + "rater": assigned.rater,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
