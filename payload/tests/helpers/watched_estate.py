"""An estate as Prometheus and Alertmanager have seen it: the real programs, over mutual TLS, with series of a made-up estate.

The series are stamped some minutes into the future, so that they are recent as long as a test takes.
"""

import math
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jinja2
import pytest
import yaml
from edge import AROUND, authority, issue, revoke
from service import PATIENCE, eventually

from llmserve.local_run import free_port

STEP, HOURS, AHEAD = 60, 26, 1800
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'


def waving(mean: float, width: float, phase: int) -> Callable[[float], float]:
    return lambda t: mean + width * math.sin(t / 2000 + phase)


# Series, and their value, or what it is at a time.
SERIES: dict[str, float | Callable[[float], float]] = {
    'up{job="node",instance="ops1"}': 1,
    'up{job="node",instance="llm1"}': 1,
    'up{job="gateway",instance="llm1",gateway="1"}': 1,
    'up{job="gpu",instance="llm1"}': 1,
    'up{job="node",instance="train1"}': 0,
    f'up{{job="node",instance="{HOSTILE.replace(chr(34), chr(92) + chr(34))}"}}': 1,
    'node_cpu_seconds_total{instance="ops1",cpu="0",mode="idle"}': lambda t: 0.93 * t,
    'node_cpu_seconds_total{instance="llm1",cpu="0",mode="idle"}': lambda t: 0.35 * t + 900 * math.sin(t / 5000),
    'node_memory_MemAvailable_bytes{instance="ops1"}': 3e9,
    'node_memory_MemAvailable_bytes{instance="llm1"}': lambda t: 11e9 + 3e9 * math.sin(t / 3000),
    'node_memory_MemTotal_bytes{instance="ops1"}': 4e9,
    'node_memory_MemTotal_bytes{instance="llm1"}': 32e9,
    'node_filesystem_avail_bytes{instance="ops1",mountpoint="/"}': 12e9,
    'node_filesystem_avail_bytes{instance="llm1",mountpoint="/"}': 3e9,
    'node_filesystem_size_bytes{instance="ops1",mountpoint="/"}': 40e9,
    'node_filesystem_size_bytes{instance="llm1",mountpoint="/"}': 80e9,
    'node_textfile_mtime_seconds{instance="ops1"}': lambda t: t,
    'node_textfile_mtime_seconds{instance="llm1"}': lambda t: t,
    'llmkeep_bundle_serial{instance="ops1"}': 42,
    'llmkeep_audit_look_seconds{instance="ops1"}': lambda t: t - 600,
    'llmkeep_audit_altered{instance="ops1"}': 0,
    'llmkeep_audit_altered{instance="<script>"}': -1,
    'llmkeep_site_serial{instance="ops1"}': 42,
    'llmkeep_verify_seconds{instance="ops1"}': lambda t: t - 7000,
    'llmkeep_verify_failed{instance="ops1"}': 0,
    'llmkeep_drifted_file{instance="llm1",path="/etc/nginx/nginx.conf"}': 1,
    'llmkeep_backup_seconds{instance="ops1"}': lambda t: t - 30000,
    'llmkeep_backup_seconds{instance="llm1"}': 0,
    'llmkeep_certificate_expiry_seconds{instance="llm1",path="/etc/llmkeep/pki/host.pem"}': lambda t: t + 61 * 86400,
    **{
        f'llm_engine_{what}{{instance="llm1",model="{model}"}}': value
        for model, up in (("deepseek-chat", 2), ("embed-small", 0))
        for what, value in (("up", up), ("stalled", 0))
    },
    'llm_requests_running{instance="llm1",model="deepseek-chat"}': lambda t: 9 + 4 * math.sin(t / 900),
    'llm_requests_waiting{instance="llm1",model="deepseek-chat"}': lambda t: max(0, 3 * math.sin(t / 1500)),
    'llm_e2e_seconds_count{instance="llm1",model="deepseek-chat"}': lambda t: 6 * t + 3000 * math.sin(t / 2000),
    'llm_e2e_seconds_count{instance="llm1",model="embed-small"}': lambda t: 2 * t,
    'llm_tokens_total{instance="llm1",model="deepseek-chat",kind="completion"}': lambda t: 900 * t,
    'llm_tokens_total{instance="llm1",model="deepseek-chat",kind="prompt"}': lambda t: 2000 * t + 9e6 * math.sin(t / 9000),
    'llm_requests_total{instance="llm1",route="/v1/chat/completions",status="503"}': lambda t: 0.02 * t + 50 * math.sin(t / 4000),
    **{
        f'llm_time_to_first_token_seconds_bucket{{instance="llm1",model="deepseek-chat",le="{le}"}}': partial(mul, 6 * share)
        for le, share in (("0.1", 0.3), ("0.3", 0.9), ("0.5", 0.996), ("1.0", 0.999), ("+Inf", 1))
    },
    'llm_time_to_first_token_seconds_count{instance="llm1",model="deepseek-chat"}': lambda t: 6 * t,
    'llm_failed_total{instance="llm1",model="deepseek-chat"}': lambda t: 0.06 * t,
    'slo:bad:ratio_rate1h{objective="TimeToFirstToken",model="deepseek-chat"}': lambda t: 0.006 + 0.004 * math.sin(t / 4000),
    **{f'llm_gpu_present{{instance="llm1",gpu="{gpu}",name="NVIDIA A100-SXM4-80GB"}}': float(gpu != 3) for gpu in range(4)},
    **{f'llm_gpu_busy_ratio{{instance="llm1",gpu="{gpu}"}}': waving(0.75, 0.15, gpu) for gpu in range(3)},
    **{f'llm_gpu_memory_used_bytes{{instance="llm1",gpu="{gpu}"}}': 70e9 for gpu in range(3)},
    **{f'llm_gpu_temperature_celsius{{instance="llm1",gpu="{gpu}"}}': waving(64, 6, gpu) for gpu in range(3)},
    **{f'llm_gpu_power_watts{{instance="llm1",gpu="{gpu}"}}': 310 for gpu in range(3)},
    **{f'llm_gpu_findings{{instance="llm1",gpu="{gpu}",drains="yes"}}': float(gpu == 3) for gpu in range(4)},
    **{f'llm_gpu_xids_total{{instance="llm1",gpu="{gpu}",code="63"}}': 0 for gpu in range(3)},
    'llm_gpu_xids_total{instance="llm1",gpu="3",code="79"}': lambda t: float(t > time.time() - 7200),
    'llm_train_step{instance="train2",exported_job="domain-lora"}': 1200,
    'llm_train_loss{instance="train2",exported_job="domain-lora"}': lambda t: 1.5 + math.exp(-(t % 90000) / 30000),
}  # fmt: skip
OBJECTIVES = [
    {
        "name": "TimeToFirstToken",
        "title": "streams that begin within 0.5 s",
        "objective": 0.99,
        "good": 'llm_time_to_first_token_seconds_bucket{le="0.5"}',
        "all": "llm_time_to_first_token_seconds_count",
        "by": ["model"],
    },
    {"name": "Availability", "title": "requests", "objective": 0.999, "bad": "gone_bad", "all": "gone_total"},
]
RULES = {
    "groups": [
        {
            "name": "alerts",
            "interval": "1s",
            "rules": [
                {
                    "alert": "TargetDown",
                    "expr": "up == 0",
                    "labels": {"severity": "page"},
                    "annotations": {
                        "summary": "{{ $labels.job }} on {{ $labels.instance }} does not answer Prometheus",
                        "runbook_url": "https://docs.example/metrics.md#target-down",
                    },
                },
                {"alert": "Watchdog", "expr": "count(up) > 0", "labels": {"severity": "none"}},
                {
                    "alert": "Hostile",
                    "expr": 'up{instance=~"<script>.*"} == 1',
                    "labels": {"severity": "ticket"},
                    "annotations": {"summary": HOSTILE, "runbook_url": "javascript:alert(1)"},
                },
            ],
        }
    ]
}


def exposition(now: float, hostile: bool) -> str:
    """The series as OpenMetrics text, metric by metric."""
    times = range(int(now) - HOURS * 3600, int(now) + AHEAD, STEP)
    lines = [
        f"{name} {value(at) if callable(value) else value:.6f} {at}"
        for name, value in sorted(SERIES.items(), key=lambda each: each[0].partition("{")[0])
        for at in times
        if hostile or "<script>" not in name
    ]
    return "\n".join([*lines, "# EOF", ""])


@dataclass
class WatchedEstate:
    """Prometheus and Alertmanager in one folder. `hostile`: with labels and annotations that would be markup.
    `ca`, `host`: certificates, beside their keys.
    """

    folder: Path
    ports: dict[str, int]
    hostile: bool = True
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ca: Path = field(init=False)
    host: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.ca = authority(self.folder, "estate")
        self.host = issue(self.ca, "host")

    @property
    def tls(self) -> dict[str, str]:
        return {
            "ca": str(self.ca),
            "certificate": str(self.host),
            "key": str(self.host.with_suffix(".key")),
        }

    @property
    def urls(self) -> dict[str, str]:
        return {name: f"https://localhost:{port}" for name, port in self.ports.items()}

    @contextmanager
    def shown(self) -> Iterator[int]:
        """The port of nginx with the configuration of role operator_page, which shows both to the host `host`."""
        role = Path(__file__).resolve().parents[3] / "roles/operator_page"
        paths = yaml.safe_load((role / "vars/main.yml").read_text())["__operator_page_paths"]
        real = {"9090": str(self.ports["prometheus"]), "9093": str(self.ports["alertmanager"])}
        environment = jinja2.Environment(  # noqa: S701 - the output is not HTML
            loader=jinja2.FileSystemLoader(role / "templates"),
            trim_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        folder = self.folder / "nginx"
        folder.mkdir()
        pki = {
            "root.pem": self.ca,
            "crl.pem": revoke(self.ca),
            "host.pem": self.host,
            "host.key": self.host.with_suffix(".key"),
        }
        for name, file in {
            **pki,
            "server.pem": self.host,
            "server.key": self.host.with_suffix(".key"),
        }.items():
            (folder / name).symlink_to(file)
        with free_port() as port:
            text = environment.get_template("monitors.conf.j2").render(
                ansible_host="127.0.0.1",
                estate_name="localhost",
                operator_page_port=port,
                __operator_page_edges=["host"],
                __operator_page_paths={path: real[to[:4]] + to[4:] for path, to in paths.items()},
            )
            (folder / "edge.conf").write_text(text.replace("/etc/llmkeep/pki", str(folder)))
            (folder / "nginx.conf").write_text(AROUND.format(folder=folder))
            command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
            with (folder / "nginx.out").open("wb") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out)
            try:
                eventually("nginx has its workers", lambda: (folder / "nginx.pid").exists())
                yield port
            finally:
                process.terminate()
                process.wait(PATIENCE)

    def write(self) -> None:
        """Configurations, and the series as blocks of Prometheus' store."""
        tls = {"ca_file": self.tls["ca"], "cert_file": self.tls["certificate"], "key_file": self.tls["key"]}
        server = {
            "cert_file": self.tls["certificate"],
            "key_file": self.tls["key"],
            "client_ca_file": self.tls["ca"],
            "client_auth_type": "RequireAndVerifyClientCert",
            "min_version": "TLS13",
        }
        alertmanager = {
            "scheme": "https",
            "tls_config": tls,
            "static_configs": [{"targets": [f"localhost:{self.ports['alertmanager']}"]}],
        }
        files: dict[str, Any] = {
            "web.yml": {"tls_server_config": server},
            "rules.yml": RULES,
            "prometheus.yml": {
                "rule_files": ["rules.yml"],
                "alerting": {"alertmanagers": [alertmanager]},
            },
            "alertmanager.yml": {"route": {"receiver": "none"}, "receivers": [{"name": "none"}]},
        }
        for name, content in files.items():
            (self.folder / name).write_text(yaml.safe_dump(content))
        recorded = self.folder / "series.txt"
        recorded.write_text(exposition(time.time(), self.hostile))
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics"]
        subprocess.run(
            [*command, str(recorded), str(self.folder / "metrics")], check=True, capture_output=True
        )

    def start(self, name: str) -> None:
        """Start `prometheus` or `alertmanager`, and wait until it is ready."""
        stored = "storage.tsdb.path" if name == "prometheus" else "storage.path"
        program = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}[name]
        command = [
            program,
            f"--config.file={self.folder / name}.yml",
            f"--{stored}={self.folder / ('metrics' if name == 'prometheus' else 'alerts')}",
            f"--web.listen-address=127.0.0.1:{self.ports[name]}",
            f"--web.config.file={self.folder / 'web.yml'}",
        ]
        # What fires before Alertmanager is discovered is dropped, and sent again after a minute by default.
        command.append(
            "--cluster.listen-address=" if name == "alertmanager" else "--rules.alert.resend-delay=1s"
        )
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

        def ready() -> bool:
            assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()
            try:
                return self.get(name, "/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        eventually(f"{name} is ready", ready, 60)

    def get(self, name: str, path: str) -> httpx.Response:
        with httpx.Client(verify=self.context(), timeout=PATIENCE) as client:
            return client.get(self.urls[name] + path)

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.host, self.host.with_suffix(".key"))
        return context

    def alerts_arrived(self) -> bool:
        """Whether Alertmanager has what fires."""
        return len(self.get("alertmanager", "/api/v2/alerts").json()) == 2 + self.hostile

    def stop(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process:
            process.kill()
            process.wait()


@contextmanager
def watched(folder: Path, hostile: bool = True) -> Iterator[WatchedEstate]:
    """Both programs within the block, with everything that fires delivered. Skips the test where they are not installed."""
    if missing := [name for name in ("prometheus", "prometheus-alertmanager") if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(missing)} of requirements.apt")
    with free_port() as first, free_port() as second:
        estate = WatchedEstate(folder, {"prometheus": first, "alertmanager": second}, hostile)
        try:
            estate.write()
            estate.start("alertmanager")
            estate.start("prometheus")
            eventually("alerts arrive", estate.alerts_arrived, 60)
            yield estate
        finally:
            for name in list(estate.processes):
                estate.stop(name)
