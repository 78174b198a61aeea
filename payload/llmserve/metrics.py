"""Prometheus metrics of the gateway. Labels come from closed sets: configured models, known routes, fixed outcomes."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

CACHE_HEADERS = ("hit", "miss", "bypass")
CACHE_RESULTS = (*CACHE_HEADERS, "shared", "error")
DECISIONS = ("allow", "deny", "unavailable")
OUTCOMES = (200, 500, 503)  # of an objective of availability: an answer, and what the client did not cause
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
OVERHEAD_SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.4,
    0.5,
    0.6,
    1.0,
    2.5,
)


@dataclass(slots=True)
class EngineState:
    """State of a model at the moment of a scrape; `up` counts its instances that answer,
    `quarantined` those on quarantined GPUs.

    `kv_used` and `gpu_used` are shares, 0 to 1, as the engine reports them.
    """

    model: str
    up: int
    stalled: bool
    running: int
    running_tokens: int
    waiting: int
    waiting_tokens: int
    kv_used: float | None
    gpu_used: list[float]
    quarantined: int


class QuickHistogram(Histogram):
    """For observations by one thread, which need no lock, without exemplars: a third of the time."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self._sum._value += amount
        self._buckets[bisect_left(self._upper_bounds, amount)]._value += 1


class EngineGauges(Collector):
    """Gauges that are read from the engine clients at the moment of a scrape."""

    def __init__(self, read: Callable[[], Iterable[EngineState]]) -> None:
        """`read` returns the state of each model."""
        self.read = read

    def collect(self) -> Iterable[Metric]:
        states = list(self.read())

        def gauge(name: str, text: str, value: Callable[[EngineState], float | None]) -> Metric:
            family = GaugeMetricFamily(name, text, labels=["model"])
            for state in states:
                if (measurement := value(state)) is not None:
                    family.add_metric([state.model], measurement)
            return family

        gpus = GaugeMetricFamily(
            "llm_gpu_utilization_ratio",
            "Share of time that a GPU of the engine's host is busy",
            labels=["model", "gpu"],
        )
        for state in states:
            for number, share in enumerate(state.gpu_used):
                gpus.add_metric([state.model, str(number)], share)
        return [
            gauge("llm_engine_up", "Instances of the model that answer", lambda it: it.up),
            gauge(
                "llm_engine_stalled",
                "1 while work is pending and the engine makes no progress",
                lambda it: it.stalled,
            ),
            gauge(
                "llm_engine_quarantined",
                "Instances of the model on quarantined GPUs",
                lambda it: it.quarantined,
            ),
            gauge("llm_requests_running", "Requests in the engine", lambda it: it.running),
            gauge("llm_tokens_running", "Tokens admitted to the engine", lambda it: it.running_tokens),
            gauge("llm_requests_waiting", "Requests waiting for a slot", lambda it: it.waiting),
            gauge("llm_tokens_waiting", "Tokens of waiting requests", lambda it: it.waiting_tokens),
            gauge("llm_kv_usage_ratio", "Used share of the engine's KV cache", lambda it: it.kv_used),
            gpus,
        ]


class Metrics:
    """All series of one gateway process, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(QuickHistogram, registry=self.registry, buckets=SECONDS)
        gauge = partial(Gauge, registry=self.registry)
        self.requests = counter("llm_requests", "Answers by route and status", ["route", "status"])
        self.first_token = histogram(
            "llm_time_to_first_token_seconds", "Time from request to first token, streams only", ["model"]
        )
        self.inter_token = histogram(
            "llm_inter_token_seconds", "Time between two pieces of a stream", ["model"]
        )
        self.whole = histogram("llm_e2e_seconds", "Time from request to the end of the answer", ["model"])
        self.failed = counter(
            "llm_failed", "Answers that failed for a reason on the server's side", ["model"]
        )
        self.queue = histogram("llm_queue_seconds", "Time waiting for a slot", ["model"])
        self.overhead = QuickHistogram(
            "llm_gateway_overhead_seconds",
            "Time from request to the answer's first byte, excluding client, queue and engine",
            ["cache"],
            registry=self.registry,
            buckets=OVERHEAD_SECONDS,
        )
        self.overhead_by = {name.encode(): self.overhead.labels(name) for name in CACHE_HEADERS}
        self.tokens = counter("llm_tokens", "Tokens by kind: prompt, completion", ["model", "kind"])
        self.cache = counter("llm_cache", "Cache by result: hit, shared, miss, bypass, error", ["result"])
        self.cache_by = {name: self.cache.labels(name) for name in CACHE_RESULTS}
        self.rejected = counter("llm_rejected", "Rejected requests by error code", ["code"])
        self.cancelled = counter(
            "llm_cancelled", "Answers cut short: client, key, policy, drain, deadline", ["by"]
        )
        self.decisions = counter(
            "llm_policy_decisions", "Policy decisions: allow, deny, unavailable", ["result"]
        )
        for result in DECISIONS:
            self.decisions.labels(result)
        self.policy_revision = gauge("llm_policy_revision", "Revision of the active policy")
        self.policy_engine = gauge("llm_policy_engine", "1 for the engine that decides", ["engine"])
        self.break_glass = counter("llm_break_glass", "Requests allowed by a break-glass file")
        self.break_glass_armed = gauge(
            "llm_break_glass_armed", "1 while a valid break-glass file is in place"
        )
        self.quota_refused = counter("llm_quota_refused", "Requests over a quota, by quota", ["quota"])
        self.audit_up = gauge("llm_audit_up", "1 while the audit writer is connected")
        self.audit_suppressed = counter("llm_audit_suppressed", "Refusals counted but not recorded")
        self.ratings = counter("llm_ratings", "Ratings kept, by thumb and stars", ["thumb", "stars"])
        self.ratings_handed_over = counter(
            "llm_ratings_handed_over",
            "Ratings of another host's answers: accepted by it, or refused and left here",
            ["verdict"],
        )
        self.ratings_outgoing = gauge(
            "llm_ratings_outgoing", "Ratings that wait for the host that answered, as last seen by a gateway"
        )
        self.answers_not_kept = counter(
            "llm_answers_not_kept", "Training answers and assignments to arms that could not be kept"
        )
        self.experiment_halted = gauge(
            "llm_experiment_halted",
            "1 for an experiment that this host has halted, 0 for one that it watches",
            ["experiment"],
        )
        self.experiment_unwatched = gauge(
            "llm_experiment_unwatched",
            "1 for an experiment whose candidate is replaced because nothing watches it, 0 for one that is watched",
            ["experiment"],
        )
        self.tasks = gauge("llm_event_loop_tasks", "asyncio tasks of this process")
        self.admission = gauge(
            "llm_engine_admission",
            "1 for the current state of the instance: admission_opened, _closed, _kept or engine_drained",
            ["socket", "state"],
        )
        self.keys = gauge("llm_keys", "Keys in the file; -1 while it cannot be read")
        self.issuer_keys = gauge(
            "llm_issuer_keys", "Keys of the identity provider; -1 while they cannot be read"
        )
        self.models: dict[str, ModelSeries] = {}
        self.answers_by: dict[tuple[str, int], Counter] = {}

    def answered(self, route: str, status: int) -> None:
        """Count an answer. `labels()` costs more than counting, so each series is looked up once."""
        self.answers(route, status).inc()

    def answers(self, route: str, status: int) -> Counter:
        """The counter of one route's answers with this status, created at zero on first use."""
        series = self.answers_by.get((route, status))
        if series is None:
            series = self.answers_by[route, status] = self.requests.labels(route, str(status))
        return series

    def expect(self, routes: Iterable[str]) -> None:
        """Show these routes' answers from the start: the increase of a counter that begins at 1 is 0."""
        for route in routes:
            for status in OUTCOMES:
                self.answers(route, status)

    def refused(self, code: str) -> None:
        """Count an error by its code; not a hot path, so the series is looked up each time."""
        self.rejected.labels(code).inc()

    def rated(self, thumb: str, stars: int) -> None:
        """Count a rating that was kept."""
        self.ratings.labels(thumb, str(stars)).inc()

    def of(self, model: str) -> "ModelSeries":
        """The series of one model, created on first use."""
        series = self.models.get(model)
        if series is None:
            series = self.models[model] = ModelSeries(self, model)
        return series

    def render(self) -> tuple[bytes, str]:
        """Body and content type of a scrape."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class ModelSeries:
    """The series of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        """Creates every series at zero, so that a scrape shows them from the start."""
        self.first_token = metrics.first_token.labels(model)
        self.inter_token = metrics.inter_token.labels(model)
        self.whole = metrics.whole.labels(model)
        self.failed = metrics.failed.labels(model)
        self.queue = metrics.queue.labels(model)
        self.prompt_tokens = metrics.tokens.labels(model, "prompt")
        self.completion_tokens = metrics.tokens.labels(model, "completion")
