"""State that the handlers of one gateway process share."""

import asyncio
import logging
from dataclasses import dataclass, field

from llmserve.access.aliases import Alias
from llmserve.access.identity import Authenticator
from llmserve.access.policy import Policy
from llmserve.access.quotas import Quotas
from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange
from llmserve.audit.recorder import Recorder
from llmserve.audit.writer_client import AuditClient
from llmserve.cache.exact import ExactCache
from llmserve.cache.single_flight import SharedAnswers
from llmserve.documents.intake_client import IntakeClient
from llmserve.documents.retrieval import Retrieval
from llmserve.feedback.halts import Halts
from llmserve.feedback.handover import Handover
from llmserve.feedback.own import OwnRecords
from llmserve.feedback.ratings import Ratings
from llmserve.gateway.in_flight import InFlightRequests
from llmserve.metrics import Metrics
from llmserve.protocol import Hello
from llmserve.redis_client import RedisClient
from llmserve.settings import Limits
from llmserve.upstream.instances import Instances

log = logging.getLogger("llmserve.gateway")


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
    handover: Handover | None = None  # to hosts that share this one's Redis
    documents: Retrieval | None = None  # None: there are no collections
    intake: IntakeClient | None = None  # None: nothing is uploaded
    draining: bool = False
    copies: set[asyncio.Task[None]] = field(default_factory=set)  # of shadow mode
    hidden: set[str] = field(default_factory=set)  # aliases by a served model of the same name

    def visible(self, exchange: Exchange) -> list[str]:
        """The models that this exchange's decision permits, in the order of the configuration; then names of experiments that are
        not names of models.
        """
        decision = exchange.decision
        if decision is None:
            return []
        experiment_names = [each.model for each in decision.experiments if each.control in self.instances]
        return [
            name for name in dict.fromkeys([*self.instances, *experiment_names]) if decision.permits(name)
        ]

    def aliases(self, exchange: Exchange) -> dict[str, Alias]:
        """The aliases that lead to one of the models of `visible`. A served model takes precedence over an alias of the same
        name."""
        aliases = exchange.decision.aliases if exchange.decision else {}
        visible = self.visible(exchange) if aliases else ()
        return {
            name: alias
            for name, alias in aliases.items()
            if name not in self.instances and alias.model in visible
        }

    def collections(self, exchange: Exchange, name: str | None) -> tuple[str, ...]:
        """The collections from which chats with this model name are answered: those of the alias, if it is one and has any."""
        alias = exchange.decision.aliases.get(name) if exchange.decision and name else None
        return alias.collections if alias and name not in self.instances else ()

    def resolve(self, exchange: Exchange, name: str) -> str:
        """The model that a name leads to, served or not; the name itself if it is not an alias."""
        alias = exchange.decision.aliases.get(name) if exchange.decision else None
        if alias is None:
            return name
        if name in self.instances:
            if name not in self.hidden:
                self.hidden.add(name)
                log.error(
                    "an alias has no effect, because a served model has the same name",
                    extra={"fields": {"llm.alias": name}},
                )
            return name
        exchange.alias = alias
        exchange.fields["llm.alias"] = name
        return alias.model

    def declared(self, names: list[str]) -> dict[str, Hello]:
        """The declarations of those of these models that are up."""
        hellos = ((name, self.instances[name].hello) for name in names if name in self.instances)
        return {name: hello for name, hello in hellos if hello}


def no_such_model(name: str, visible: list[str], client_name: str | None = None) -> ApiError:
    """A 404. A model that the caller may not use looks like one that does not exist. `client_name`: the name that the client
    sent."""
    listed = ", ".join(f"'{model}'" for model in visible) or "none"
    alias = f", to which the alias '{client_name}' leads" if client_name not in (None, name) else ""
    message = f"there is no model '{name[:80]}'{alias}: you may use {listed}"
    return ApiError(404, "model_not_found", message, "model")
