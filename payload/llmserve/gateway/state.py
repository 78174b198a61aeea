"""State that the handlers of one gateway process share."""

import asyncio
from dataclasses import dataclass, field

from llmserve.access.identity import Authenticator
from llmserve.access.policy import Policy
from llmserve.access.quotas import Quotas
from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange
from llmserve.audit.recorder import Recorder
from llmserve.audit.writer_client import AuditClient
from llmserve.cache.exact import ExactCache
from llmserve.cache.single_flight import SharedAnswers
from llmserve.feedback.halts import Halts
from llmserve.feedback.own import OwnRecords
from llmserve.feedback.ratings import Ratings
from llmserve.gateway.in_flight import InFlightRequests
from llmserve.metrics import Metrics
from llmserve.protocol import Hello
from llmserve.redis_client import RedisClient
from llmserve.settings import Limits
from llmserve.upstream.instances import Instances


@dataclass
class State:
    instances: dict[str, Instances]
    authenticator: Authenticator
    limits: Limits
    metrics: Metrics
    in_flight: InFlightRequests
    redis: RedisClient | None
    cache: ExactCache | None
    cache_secret: bytes
    shared: SharedAnswers
    policy: Policy
    quotas: Quotas
    audit: AuditClient
    recorder: Recorder
    ratings: Ratings
    halts: Halts
    own: OwnRecords
    draining: bool = False
    copies: set[asyncio.Task[None]] = field(default_factory=set)  # of shadow mode

    def visible(self, exchange: Exchange) -> list[str]:
        """The models that this exchange's decision permits, in the order of the configuration; then names of experiments that
        are no model's own.
        """
        decision = exchange.decision
        if decision is None:
            return []
        named = [each.model for each in decision.experiments if each.control in self.instances]
        return [name for name in dict.fromkeys([*self.instances, *named]) if decision.permits(name)]

    def declared(self, names: list[str]) -> dict[str, Hello]:
        """What each of these models declares, but for those that are not up."""
        known = ((name, self.instances[name].hello) for name in names if name in self.instances)
        return {name: hello for name, hello in known if hello}


def no_such_model(name: str, visible: list[str]) -> ApiError:
    """404. A model that the caller may not use looks like one that does not exist."""
    listed = ", ".join(f"'{model}'" for model in visible) or "none"
    message = f"there is no model '{name[:80]}': you may use {listed}"
    return ApiError(404, "model_not_found", message, "model")
