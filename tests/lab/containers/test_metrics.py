"""What is measured, and who is told: Prometheus on both hosts over the finished estate, GPUs of a stand-in on llm1.

The receivers of alerts are stand-ins, too (molecule/prometheus/alert_sink.py), one on each host.
"""

import json
import re
import subprocess
import time
from typing import Any

import pytest
import yaml
from estate import HOSTS, QUESTION, ROOT, Client, Lab, changed, request, within

MODEL = "smollm2-135m-instruct"
INVENTORY = "/root/watched"
SINK = ROOT / "molecule/prometheus/alert_sink.py"
# NVIDIA's driver is told by this file.
DRIVER = """
mount -t tmpfs tmpfs /proc/driver && mkdir /proc/driver/nvidia
echo 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06' > /proc/driver/nvidia/version
ldconfig
"""
RECEIVE = "systemd-run --quiet --unit=alert-sink python3 /root/alert_sink.py"
GIVEN = {
    "prometheus_seconds": 2,
    "prometheus_memory_mb": 512,
    "prometheus_disk": "500MB",
    "prometheus_webhook": "http://127.0.0.1:9099/alerts",
    "gpu_set": "provided",
    "gpu_health_expect": {"count": 8, "name": "NVIDIA A100-SXM4-80GB"},
    "gpu_health_engines": [{"name": MODEL, "socket": f"/run/llm-engine/{MODEL}.sock", "gpus": [0]}],
    "gpu_health_seconds": 1,
    "gpu_health_stale_seconds": 4,
}


def site(lab: Lab, tags: str) -> str:
    inventories = f"-i inventory/lab -i {INVENTORY}"
    return lab.on("ops1", f"llmkeep site {inventories} --tags {tags}", timeout=900)


@pytest.fixture(scope="module")
def watched(estate: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The estate with Prometheus on both hosts, and 8 GPUs that are watched."""
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run([ROOT / "tests/doubles/nvml/build.sh", folder], check=True)
    estate.send("llm1", "/usr/local/lib", {path.name: path for path in folder.iterdir()})
    estate.on("llm1", f"set -e{DRIVER}")
    groups: dict[str, Any] = {name: {"hosts": {"llm1": {}}} for name in ("prometheus", "gpu")}
    inventory = yaml.safe_dump({"all": {"vars": GIVEN, "children": groups}})
    estate.on("ops1", f"mkdir -p {INVENTORY} && cat > {INVENTORY}/hosts.yml", given=inventory)
    for host in HOSTS:
        estate.send(host, "/root", {SINK.name: SINK})
        estate.on(host, RECEIVE)
    site(estate, "gpu_health,exporters,prometheus")
    return estate


def query(lab: Lab, host: str, expression: str) -> dict[str, float]:
    """The values of an expression in a host's Prometheus, by label `instance`."""
    found = json.loads(
        lab.on(
            host,
            "promtool query instant --format json --http.config.file /etc/prometheus/client.yml"
            f" https://127.0.0.1:9090 '{expression}'",
        )
    )
    return {each["metric"].get("instance", ""): float(each["value"][1]) for each in found}


def delivered(lab: Lab, alert: str) -> list[dict[str, Any]]:
    """The notifications that any receiver got of an alert."""
    lines = [line for host in HOSTS for line in lab.on(host, "cat /run/alerts/webhook").splitlines()]
    got = [json.loads(line) for line in lines if line]
    return [one for one in got if one["groupLabels"].get("alertname") == alert and one["status"] == "firing"]


def heading(url: str) -> str:
    """The heading of docs/operate/metrics.md that an alert links to; fails where there is none."""
    path, _, anchor = url.partition("#")
    assert path in (
        "https://ops1.estate.internal:8443/docs/docs/operate/metrics.html",
        "/opt/llmkeep/tree/docs/operate/metrics.md",  # where what builds the site is not installed
    )
    (found,) = re.findall(f"^### {anchor}$", (ROOT / "docs/operate/metrics.md").read_text(), re.MULTILINE)
    return str(found).removeprefix("### ")


def test_both_hosts_show_the_latency_of_a_question(watched: Lab, client: Client) -> None:
    counted = {
        "first token": "sum by (instance) (llm_time_to_first_token_seconds_count)",
        "requests": 'sum by (instance) (llm_requests_total{route="/generate",status="200"})',
    }
    before = {
        (host, name): query(watched, host, expression).get("llm1", 0)
        for host in HOSTS
        for name, expression in counted.items()
    }
    body = {"prompt": QUESTION, "max_tokens": 2, "temperature": 0, "stream": True}
    status, events = request(client, "POST", "/generate", body)
    assert (status, b"data: " in events) == (200, True)
    for (host, name), count in before.items():
        within(
            10,
            f"{name} rises on {host}",
            lambda host=host, name=name, count=count: (  # type: ignore[misc]
                query(watched, host, counted[name]).get("llm1", 0) > count
            ),
        )
    for host in HOSTS:
        assert query(watched, host, "min by (job) (up)") == {"": 1}


def test_a_gpus_fault_is_told_once_with_its_runbook_whatever_else_is_away(watched: Lab) -> None:
    """While the alert on the GPU is pending: an Alertmanager is away, and the other one's receiver."""
    watched.on("llm1", "echo 5.xid = 79 > /etc/mock-nvml.conf")
    watched.on("ops1", "systemctl stop prometheus-alertmanager")
    watched.on("llm1", "systemctl stop alert-sink")
    ending = 'llmkeep_certificate_expiry_seconds{path="soon"} 1'
    watched.on("ops1", "cat > /var/lib/llmkeep-readings/soon.prom", given=f"{ending}\n")
    retried = "journalctl --quiet --unit prometheus-alertmanager --grep 'Notify attempt failed'; true"
    within(60, "the webhook is tried", lambda: watched.on("llm1", retried) != "")
    assert delivered(watched, "CertificateEnds") == []
    watched.on("llm1", RECEIVE)
    within(60, "it is delivered once it can be", lambda: delivered(watched, "CertificateEnds") != [])
    watched.on("ops1", "systemctl start prometheus-alertmanager")
    assert changed(site(watched, "exporters,prometheus")) == {"ops1": 0, "llm1": 0}
    within(120, "the fault is told", lambda: delivered(watched, "GpuSick") != [])
    # Between Alertmanagers the second one has its turn 15 s after the first.
    time.sleep(25)
    firing = 'ALERTS{alertname="GpuSick",alertstate="firing"}'
    assert [query(watched, host, firing) for host in HOSTS] == [{"llm1": 1}] * 2
    [told] = delivered(watched, "GpuSick")
    assert len(delivered(watched, "CertificateEnds")) == 1
    [alert] = told["alerts"]
    assert heading(alert["annotations"]["runbook_url"]) == "gpu-sick"
