"""The gateway's routing table."""

from pathlib import Path

from llmserve.access.api_keys import KeyTable
from llmserve.access.identity import Authenticator
from llmserve.access.opa import OpaServer
from llmserve.access.policy import Policy
from llmserve.access.quotas import Quotas
from llmserve.audit.recorder import Recorder
from llmserve.audit.writer_client import AuditClient
from llmserve.cache.single_flight import SharedAnswers
from llmserve.feedback.halts import Halts
from llmserve.feedback.own import OwnRecords
from llmserve.feedback.ratings import Ratings
from llmserve.feedback.response_ids import ResponseIds
from llmserve.gateway.in_flight import InFlightRequests
from llmserve.gateway.route import Route
from llmserve.gateway.routes import routing_table
from llmserve.gateway.state import State
from llmserve.metrics import Metrics
from llmserve.settings import Limits


def every_route(folder: Path) -> list[Route]:
    """The routing table of a gateway that is connected to nothing."""
    metrics = Metrics()
    audit = AuditClient(folder / "none", metrics)
    state = State(
        instances={},
        authenticator=Authenticator(KeyTable(folder / "none", b"")),
        limits=Limits(),
        metrics=metrics,
        in_flight=InFlightRequests(metrics),
        redis=None,
        cache=None,
        cache_secret=b"",
        halts=Halts(None, metrics),
        shared=SharedAnswers(metrics),
        policy=Policy(OpaServer(folder / "none", 1), metrics, None, None),
        quotas=Quotas(None, metrics),
        audit=audit,
        recorder=Recorder(audit, b""),
        ratings=Ratings(ResponseIds((b"",)), None, metrics),
        own=OwnRecords(None, None),
    )
    return routing_table(state)
