"""What alerts of the estate (roles/prometheus) take from a scrape of the gateway."""

from llmserve.metrics import Metrics


def test_each_latency_with_an_objective_has_a_bucket_that_ends_at_half_a_second() -> None:
    metrics = Metrics()
    metrics.of("small").first_token.observe(0.5)
    metrics.overhead_by[b"hit"].observe(0.5)
    for name, labels in (
        ("llm_time_to_first_token_seconds_bucket", {"model": "small"}),
        ("llm_gateway_overhead_seconds_bucket", {"cache": "hit"}),
    ):
        in_time, before = (
            metrics.registry.get_sample_value(name, labels | {"le": seconds}) for seconds in ("0.5", "0.4")
        )
        assert (in_time, before) == (1, 0)


def test_what_must_never_happen_is_zero_from_the_start_so_that_its_first_time_is_an_increase() -> None:
    metrics = Metrics()
    metrics.expect(["/generate"])
    value = metrics.registry.get_sample_value
    assert value("llm_policy_decisions_total", {"result": "unavailable"}) == 0
    for status in ("200", "500", "503"):
        assert value("llm_requests_total", {"route": "/generate", "status": status}) == 0
