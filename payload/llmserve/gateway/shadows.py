"""Shadow mode: a candidate gets a copy of a request that the control has answered; its answer reaches no client.

A copy starts once the client has its answer, waits behind all client requests, and counts against no quota. It has its own
exchange in the audit record, which names the original, and so does its outcome.
"""

import asyncio
import random
import time
from dataclasses import replace

from llmserve.access.experiments import OPENING, Experiment
from llmserve.api.errors import ApiError
from llmserve.api.requests import undeclared
from llmserve.asgi import Exchange
from llmserve.gateway.answer_source import failure
from llmserve.gateway.parsed_requests import ParsedRequest
from llmserve.gateway.state import State
from llmserve.protocol import Done, Failed
from llmserve.upstream.admission import Place
from llmserve.upstream.instances import Instances

MOST = 2  # copies at a time, of one gateway
QUEUE_SECONDS = 5.0
LAST = -1  # priority; users have 0 or more
# Of a copy: users were first, so the candidate did not fail.
NO_ROOM = ("queue_timeout", "overloaded", "too_many_waiting")


class Shadows:
    """The copies of one gateway process."""

    def __init__(self, state: State) -> None:
        self.state = state

    def consider(self, exchange: Exchange, parsed: ParsedRequest, tokens: int) -> None:
        """Start a copy of this exchange if its experiment requires one and there is room. `tokens`: of prompt and answer."""
        assigned, decision = exchange.assigned, exchange.decision
        if assigned is None or not assigned.shadowed or assigned.arm != "control" or exchange.cache == b"hit":
            return
        experiment = decision.experiment(assigned.model) if decision else None
        if experiment is None or random.random() * 100 >= experiment.shadow:  # noqa: S311 - a sample
            return
        candidate = self.state.instances.get(experiment.candidate)
        full = len(self.state.copies) >= MOST or self.state.draining
        if full or self.state.halts.reason(experiment) or candidate is None or not candidate.up:
            return
        task = asyncio.get_running_loop().create_task(
            self.ask(exchange, parsed, experiment, candidate, tokens)
        )
        self.state.copies.add(task)
        task.add_done_callback(self.state.copies.discard)

    async def ask(
        self,
        of: Exchange,
        parsed: ParsedRequest,
        experiment: Experiment,
        candidate: Instances,
        tokens: int,
    ) -> None:
        """Send the copy to the candidate, and note how it answered."""
        copy = Exchange(of.request_id, of.trace_id, of.sampled, time.monotonic())
        copy.identity, copy.decision, copy.action = of.identity, of.decision, of.action
        copy.route, copy.address = of.route, of.address
        if of.identity is None or of.assigned is None:
            raise RuntimeError("this exchange has no arm")
        copy.assigned = replace(of.assigned, arm="candidate", shadow=of.transaction)
        request = replace(parsed.call.generate, stream=False, traceparent=copy.traceparent.decode())
        error: BaseException | None = None
        try:
            routed = candidate.route(of.identity.tenant, request)
        except ApiError:  # it left meanwhile: nothing was asked
            return
        if undeclared(request, routed.hello):
            return
        seconds = self.state.limits.answer_seconds
        place = Place(QUEUE_SECONDS, tokens, LAST, copy.started + seconds, seconds)
        try:
            await self.state.recorder.intent(copy, routed.model, parsed.content, parsed.proof)
        except ApiError:  # not on record, so not asked
            return
        try:
            async with asyncio.timeout(seconds):
                frame, _ = await routed.begin(request, place)
            copy.first = time.monotonic()
            if isinstance(frame, Failed):
                raise failure(frame)
            self.answered(copy, frame if isinstance(frame, Done) else None)
            copy.status = 200
        except ApiError as failed:
            error = failed
        except TimeoutError:
            error = ApiError(504, "deadline_exceeded", "the candidate did not answer in time")
        except BaseException as ended:  # this process stops
            error = ended
            raise
        finally:
            routed.cancel(request.id)
            if isinstance(error, ApiError):
                copy.status, copy.code = error.status, error.code
            elif error:
                copy.status, copy.code = 499, "copy_ended"
            self.state.recorder.close(copy, int((time.monotonic() - copy.started) * 1e9))
            if copy.code not in NO_ROOM:
                self.state.ratings.ended(copy, error)

    def answered(self, copy: Exchange, frame: Done | None) -> None:
        """Note length, finish reason and beginning of the answer, and drop it."""
        if frame is None:
            raise RuntimeError("a piece of a stream in an answer that is not streamed")
        copy.fields["gen_ai.usage.input_tokens"] = frame.prompt_tokens
        copy.fields["gen_ai.usage.output_tokens"] = frame.completion_tokens
        copy.fields["llm.finish_reason"] = frame.finish_reason
        copy.opening = frame.text.lstrip()[:OPENING]
