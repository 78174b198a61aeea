"""Prometheus metrics of the GPUs. Without a recent reading a scrape fails, rather than showing values of the past."""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from llmgpu.nvml import Gpu, Reading
from llmgpu.xids import OTHER, TABLE, label

log = logging.getLogger("llmgpu.metrics")
GAUGES: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("llm_gpu_busy_ratio", "Share of time that the GPU is busy, 0 to 1", lambda gpu: gpu.utilization),
    ("llm_gpu_memory_used_bytes", "Used memory", lambda gpu: gpu.memory_used),
    ("llm_gpu_memory_total_bytes", "Memory", lambda gpu: gpu.memory_total),
    ("llm_gpu_temperature_celsius", "Temperature", lambda gpu: gpu.temperature),
    ("llm_gpu_power_watts", "Power", lambda gpu: gpu.power),
    ("llm_gpu_power_limit_watts", "Power limit", lambda gpu: gpu.power_limit),
    ("llm_gpu_throttle_reasons", "NVML's bit mask of reasons for lower clocks", lambda gpu: gpu.throttled),
    ("llm_gpu_ecc_corrected", "Corrected ECC errors since the driver was loaded", lambda g: g.ecc_corrected),
    (
        "llm_gpu_ecc_uncorrected",
        "Uncorrected ECC errors since the driver was loaded",
        lambda gpu: gpu.ecc_uncorrected,
    ),
    ("llm_gpu_remapped_rows", "Remapped memory rows", lambda gpu: gpu.remapped),
    ("llm_gpu_pcie_width", "PCIe lanes", lambda gpu: gpu.pcie_width),
    ("llm_gpu_nvlinks_up", "NVLinks that are up", lambda gpu: gpu.nvlinks - len(gpu.nvlinks_down)),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of a scrape. `age`: seconds since the last successful reading. `findings`: number by GPU ("" for the host) and
    whether they drain. `quarantined`: engines, 1 or 0.
    """

    reading: Reading
    age: float
    findings: dict[tuple[str, bool], int]
    quarantined: dict[str, bool]


class Stale(Exception):
    """There is no recent reading; the message says why."""


class GpuGauges(Collector):
    """Gauges that are read at the moment of a scrape."""

    def __init__(self, look: Callable[[], Snapshot]) -> None:
        """`look` raises Stale."""
        self.look = look

    def describe(self) -> Iterable[Metric]:
        """Returns nothing, since registering must not take a reading."""
        return ()

    def collect(self) -> Iterable[Metric]:
        snapshot = self.look()
        age = GaugeMetricFamily("llm_gpu_last_success_age_seconds", "Age of the last successful reading")
        age.add_metric([], snapshot.age)
        yield age
        present = GaugeMetricFamily("llm_gpu_present", "1 if the GPU answers", labels=["gpu", "uuid", "name"])
        for gpu in snapshot.reading.gpus:
            present.add_metric([str(gpu.index), gpu.uuid, gpu.name], not gpu.lost)
        yield present
        for name, text, value in GAUGES:
            family = GaugeMetricFamily(name, text, labels=["gpu"])
            for gpu in snapshot.reading.gpus:
                if not gpu.lost and (measurement := value(gpu)) is not None:
                    family.add_metric([str(gpu.index)], measurement)
            yield family
        findings = GaugeMetricFamily("llm_gpu_findings", "What is wrong now", labels=["gpu", "drains"])
        for gpu_index in ["", *(str(gpu.index) for gpu in snapshot.reading.gpus)]:
            for drains in (True, False):
                number = snapshot.findings.get((gpu_index, drains), 0)
                findings.add_metric([gpu_index, "yes" if drains else "no"], number)
        yield findings
        quarantined = GaugeMetricFamily(
            "llm_gpu_engine_quarantined", "1 while the engine is quarantined", labels=["engine"]
        )
        for engine, value_ in snapshot.quarantined.items():
            quarantined.add_metric([engine], value_)
        yield quarantined


@dataclass(slots=True)
class Metrics:
    """All series. Xid counters start at 0 for each known code: an alert on an increase sees the first one, too."""

    look: Callable[[], Snapshot]
    gpus: int  # expected
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    xids: Counter = field(init=False)

    def __post_init__(self) -> None:
        self.xids = Counter("llm_gpu_xids", "Xid events", ["gpu", "code"], registry=self.registry)
        for gpu in range(self.gpus):
            for code in (*map(str, TABLE), OTHER):
                self.xids.labels(str(gpu), code)
        self.registry.register(GpuGauges(self.look))

    def count(self, gpu: int | None, code: int, number: int) -> None:
        """`gpu`: its index, or None if the driver did not say."""
        in_range = gpu is not None and gpu < self.gpus
        self.xids.labels(str(gpu) if in_range else "unknown", label(code)).inc(number)

    def listen(self, host: str, port: int, quarantine: Callable[[], bytes]) -> ThreadingHTTPServer:
        """Serve GET /metrics in a thread: 200, or 503 without a recent reading. GET /quarantine returns the result of
        `quarantine` to gateways of other hosts.
        """
        registry = self.registry

        class Scrape(BaseHTTPRequestHandler):
            timeout = 10  # a client that sends nothing must not hold a thread
            protocol_version = "HTTP/1.1"  # connections are reused

            def do_GET(self) -> None:
                if self.path == "/quarantine":
                    return self.answer(200, quarantine(), "application/json")
                if self.path != "/metrics":
                    return self.answer(
                        404, b"there is only GET /metrics and /quarantine here\n", "text/plain"
                    )
                try:
                    body = generate_latest(registry)
                except Stale as error:
                    return self.answer(503, f"{error}\n".encode(), "text/plain; charset=utf-8")
                return self.answer(200, body, CONTENT_TYPE_LATEST)

            def answer(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Scrapes are not logged."""

        server = ThreadingHTTPServer((host, port), Scrape)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return server
