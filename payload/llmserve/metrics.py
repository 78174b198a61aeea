"""What the gateway counts. Labels come from closed sets: our models, our routes, our outcomes."""

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.8,
    1.0,
    1.5,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)


class EngineGauges(Collector):
    """Gauges that are read from the engines' links at the moment of a scrape."""

    def __init__(self, read: Callable[[], Iterable[tuple[str, int, int, int]]]) -> None:
        """`read` gives (model, up, running, waiting) for each engine."""
        self.read = read

    def collect(self) -> Iterable[Metric]:
        """One sample a model and gauge."""
        up = GaugeMetricFamily("llm_engine_up", "Instances of the model that answer", labels=["model"])
        running = GaugeMetricFamily("llm_requests_running", "Requests in the engine", labels=["model"])
        waiting = GaugeMetricFamily("llm_requests_waiting", "Requests that wait for a slot", labels=["model"])
        for model, is_up, runs, waits in self.read():
            up.add_metric([model], is_up)
            running.add_metric([model], runs)
            waiting.add_metric([model], waits)
        return [up, running, waiting]


class Metrics:
    """All series of one gateway process, in a registry of their own."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        gauge = partial(Gauge, registry=self.registry)
        self.requests = counter("llm_requests", "Answers by route and status", ["route", "status"])
        self.first_token = histogram(
            "llm_time_to_first_token_seconds", "From request to first token, streams", ["model"]
        )
        self.inter_token = histogram("llm_inter_token_seconds", "Between two pieces of a stream", ["model"])
        self.whole = histogram("llm_e2e_seconds", "From request to the end of the answer", ["model"])
        self.queue = histogram("llm_queue_seconds", "Wait for a slot", ["model"])
        self.tokens = counter("llm_tokens", "Tokens by kind: prompt, completion", ["model", "kind"])
        self.cache = counter("llm_cache", "Cache by result: hit, miss, bypass, error", ["result"])
        self.rejected = counter("llm_rejected", "Requests refused, by code of the error", ["code"])
        self.cancelled = counter(
            "llm_cancelled", "Answers cut short: client, key, policy, drain, deadline", ["by"]
        )
        self.decisions = counter(
            "llm_policy_decisions", "Answers of the engine: allow, deny, unavailable", ["result"]
        )
        self.policy_revision = gauge("llm_policy_revision", "Revision of the policy that decides")
        self.break_glass = counter("llm_break_glass", "Requests that a break-glass file let through")
        self.break_glass_armed = gauge(
            "llm_break_glass_armed", "1 while there is a break-glass file that counts"
        )
        self.quota_refused = counter("llm_quota_refused", "Requests over a quota, by quota", ["quota"])
        self.audit_up = gauge("llm_audit_up", "1 while the audit writer is there")
        self.audit_suppressed = counter("llm_audit_suppressed", "Refusals that were counted and not recorded")
        self.keys = gauge("llm_keys", "Keys in the file; -1 while it cannot be read")
        self.issuer_keys = gauge(
            "llm_issuer_keys", "Keys of the identity provider; -1 while they cannot be read"
        )

        self.models: dict[str, ModelSeries] = {}

    def of(self, model: str) -> "ModelSeries":
        """The series of one model, looked up once: `labels()` costs more than counting does."""
        series = self.models.get(model)
        if series is None:
            series = self.models[model] = ModelSeries(self, model)
        return series

    def render(self) -> tuple[bytes, str]:
        """Body and content type of a scrape."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class ModelSeries:
    """What is counted for one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        """All at zero, so that a scrape shows them from the start."""
        self.first_token = metrics.first_token.labels(model)
        self.inter_token = metrics.inter_token.labels(model)
        self.whole = metrics.whole.labels(model)
        self.queue = metrics.queue.labels(model)
        self.prompt_tokens = metrics.tokens.labels(model, "prompt")
        self.completion_tokens = metrics.tokens.labels(model, "completion")
