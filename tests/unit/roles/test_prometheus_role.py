"""What role prometheus refuses, and what it makes of an inventory, without a host."""

import re
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from cluster_keys import ClusterKeys
from plugin_modules import ROOT, load
from prometheus_here import prometheus_here
from rendered_prometheus import job_of_pods, watching_pods
from rendered_role import content, played, rendered
from waiting import until

load("filter.prometheus")  # puts the collection where Ansible finds it
# By host: a variable, its value, and what of the message tells that it is refused.
CASES = {
    "tls": ("prometheus_webhook", "https://relay/alerts", ""),
    "loopback": ("prometheus_webhook", "http://127.0.0.1:9099/alerts", ""),
    "bare": ("prometheus_webhook", "http://127.0.0.1", ""),
    "webhook": ("prometheus_mail", {}, ""),
    "unaddressed": ("prometheus_mail", {"to": "a@example.org"}, "lacks from, server"),
    "mail": ("prometheus_webhook", "", ""),
    "plain": ("prometheus_webhook", "http://relay/", "use an https URL"),
    "userinfo": ("prometheus_webhook", "http://127.0.0.1:x@relay/", "use an https URL"),
    "port": ("prometheus_webhook", "http://127.0.0.1:80@relay/", "use an https URL"),
    "suffix": ("prometheus_webhook", "http://127.0.0.1.relay/", "use an https URL"),
    "heartbeat": ("prometheus_heartbeat_webhook", "http://relay/", "use an https URL"),
    "megabytes": ("prometheus_disk", "1500MB", ""),
    "pods": (
        "prometheus_clusters",
        [{"name": "main", "pods": [{"address": "10.0.0.7"}, {"address": "fd00::7"}]}],
        "",
    ),
    "nameserver": (
        "prometheus_clusters",
        [{"name": "main", "pods": [{"address": "bee.cafe"}]}],
        "use an address",
    ),
    "label": (
        "prometheus_clusters",
        [{"name": "main, x: y", "pods": []}],
        "Use letters, digits and hyphens",
    ),
    "unitless": ("prometheus_disk", "8G", "Use a whole number and one of MB, GB, TB"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a host's preflight ended with, by host."""
    folder = tmp_path_factory.mktemp("preflight")
    facts = {
        "distribution": "Debian",
        "distribution_major_version": "13",
        "os_family": "Debian",
        "pkg_mgr": "apt",
    }
    play = {
        "hosts": "all",
        "connection": "local",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.set_fact": {**facts, "cacheable": True}},
            {"ansible.builtin.import_role": {"name": "llmkeep.estate.prometheus", "tasks_from": "preflight"}},
        ],
    }
    estate = {
        "hosts": {host: {key: value} for host, (key, value, _) in CASES.items()},
        "vars": {
            "prometheus_webhook": "https://relay/",
            "prometheus_mail": {"to": "a@example.org", "from": "b@example.org", "server": "mail:587"},
        },
    }
    done = played(folder, play, estate)
    output = " ".join(done.stdout.split())
    failed = dict(part.split("]: FAILED!", 1) for part in output.split("fatal: [")[1:])
    assert set(failed) < set(CASES), output + done.stderr
    return {host: failed.get(host, "") for host in CASES}


@pytest.mark.parametrize("host", CASES)
def test_what_prometheus_could_not_use_or_would_send_in_the_clear_is_refused(
    host: str, told: dict[str, str]
) -> None:
    message = CASES[host][2]
    assert message in told[host]
    assert bool(message) == bool(told[host]), told[host]


# Series that hosts may not export of others.
FOREIGN = ("llmkeep_audit_altered", "llmkeep_verify_failed", "llmkeep_site_serial", "llmkeep_bundle_serial",
           "llmkeep_volume_drill_seconds", "llmkeep_logs_missing", "llmkeep_cve_open", "llmkeep_log_full_seconds")  # fmt: skip


def dropped(rules: list[dict[str, Any]], name: str, instance: str) -> bool:
    return any(re.fullmatch(one["regex"], f"{name};{instance}") for one in rules)


def test_an_estate_with_a_webhook_alone_is_of_the_roles_form() -> None:
    spec = yaml.safe_load((ROOT / "roles/prometheus/meta/argument_specs.yml").read_text())
    options = spec["argument_specs"]["main"]["options"]
    default = yaml.safe_load((ROOT / "roles/prometheus/defaults/main.yml").read_text())["prometheus_mail"]
    given = {"prometheus_webhook": "https://relay/", "prometheus_mail": default}
    assert not ArgumentSpecValidator(options).validate(given).error_messages


@pytest.mark.parametrize("serving", [True, False])
def test_receivers_are_quoted_and_private_and_objectives_are_judged_where_a_host_serves(
    serving: bool, tmp_path: Path
) -> None:
    mail = {"to": "ops@estate.internal", "from": '"Alerts: all" <a@estate.internal>', "server": "mail:25"}
    given = {
        "prometheus_webhook": "https://relay/alerts?key=a: #b",
        "prometheus_heartbeat_webhook": "https://watch/beat" if serving else "",
        "prometheus_mail": mail,
        "prometheus_hosts": ["ops1", "llm1"] if serving else ["ops1"],
        "estate_name": "ops1.estate.internal",
        "exporters_port": 9443,
        "edge_port": 443,
        "llm_serving_gateways": 1,
        "role_path": str(ROOT / "roles/prometheus"),
        "ansible_facts": {"os_family": "Debian"},
    }
    hosts = {"ops1.estate.internal": "10.0.0.1", "llm1.estate.internal": "10.0.0.2"}
    groups = {"control": ["ops1"], "serve": ["llm1"], "edge": ["llm1"], "search": ["ops1"], "logs": ["llm1"]}
    made = rendered(tmp_path, "prometheus", {}, "ops1", hosts, given, groups, configured=True)
    (tmp_path / "prometheus.yml").write_text(content(made, "prometheus.yml"))
    check = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    judged = subprocess.run(check, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stderr
    scraped = yaml.safe_load(content(made, "prometheus.yml"))["scrape_configs"]
    for job in scraped:
        rules = [one for one in job.get("metric_relabel_configs") or [] if one["action"] == "drop"]
        others = serving and job["job_name"] in ("node", "gateway", "redis", "nginx", "elasticsearch")
        assert [dropped(rules, name, "llm1") for name in FOREIGN] == [others] * len(FOREIGN)
        assert not any(dropped(rules, name, "ops1") for name in FOREIGN)
        assert not dropped(rules, "llmkeep_certificate_expiry_seconds", "llm1")
    labels = {job["job_name"]: [target["labels"] for target in job["static_configs"]] for job in scraped}
    paths = [(one["instance"], one["__metrics_path__"]) for one in labels["edge"]]
    assert paths == [("llm1", "/edge-llm1-tls13"), ("llm1", "/edge-llm1-old-tls")]
    assert [one.get("stream") for one in labels["node"]] == ([None, "llm1"] if serving else [None])
    assert ("redis" in labels, "nginx" in labels, "elasticsearch" in labels) == (serving, serving, True)
    (entry,) = (one for one in made["tree"]["files"] if one["dest"] == "/etc/prometheus/alertmanager.yml")
    assert (entry["group"], entry["mode"]) == ("prometheus", "0640")
    receiver, heartbeat = yaml.safe_load(content(made, "alertmanager.yml"))["receivers"]
    beats = [(one["url"], one["send_resolved"]) for one in heartbeat.get("webhook_configs", [])]
    assert beats == ([("https://watch/beat", False)] if serving else [])
    assert receiver["webhook_configs"][0]["url"] == given["prometheus_webhook"]
    assert [receiver["email_configs"][0][key] for key in ("to", "from", "smarthost")] == list(mail.values())
    alerts = [
        rule.get("alert", "")
        for group in yaml.safe_load(content(made, "rules.yml"))["groups"]
        for rule in group["rules"]
    ]
    assert any(alert.endswith("WithoutData") for alert in alerts) == serving
    assert "TargetDown" in alerts


@pytest.mark.parametrize(("serving", "memory", "heap"), [(1, 1024, 768), (300, 3000, 2250)])
def test_prometheus_has_memory_for_every_host_that_serves(
    serving: int, memory: int, heap: int, tmp_path: Path
) -> None:
    names = [f"llm{number}" for number in range(serving)]
    hosts = {f"{name}.estate.internal": "10.0.0.1" for name in ("ops1", *names)}
    unit = {"unit": "lookup('ansible.builtin.template', 'prometheus.service.j2')"}
    given = {"role_path": str(ROOT / "roles/prometheus")}
    made = rendered(tmp_path, "prometheus", unit, "ops1", hosts, given, {"control": ["ops1"], "serve": names})
    assert f"\nMemoryMax={memory}M\nEnvironment=GOMEMLIMIT={heap}MiB\n" in made["unit"]


def test_pods_are_watched_as_gateways_of_hosts_are(tmp_path: Path) -> None:
    pods = [
        {"name": "llm-0", "address": "10.20.40.20", "port": 9443},
        {"name": "llm-1", "address": "fd00::21", "port": 30943},
    ]
    made = watching_pods(tmp_path, "llm.estate.internal", pods)
    (tmp_path / "prometheus.yml").write_text(content(made, "prometheus.yml"))
    check = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    judged = subprocess.run(check, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stderr
    job = job_of_pods(made)
    assert job["tls_config"]["server_name"] == "llm.estate.internal"
    assert {target["targets"][0]: target["labels"]["instance"] for target in job["static_configs"]} == {
        "10.20.40.20:9443": "main.llm-0",
        "[fd00::21]:30943": "main.llm-1",
    }
    assert content(made, "output-prometheus.nft").splitlines() == [
        "ip daddr 10.20.40.20 tcp dport 9443 accept",
        "ip6 daddr fd00::21 tcp dport 30943 accept",
    ]
    unit = content(made, "prometheus.service.d/llmkeep.conf")
    assert "IPAddressAllow=localhost 10.0.0.1 10.20.40.20 fd00::21\n" in unit
    alerts = {
        rule.get("alert")
        for group in yaml.safe_load(content(made, "rules.yml"))["groups"]
        for rule in group["rules"]
    }
    assert {"NoSourceGateway", "TimeToFirstTokenWithoutData"} <= alerts


def test_a_prometheus_in_the_cluster_stores_the_same_of_a_pod(tmp_path: Path) -> None:
    made = watching_pods(
        tmp_path, "llm.estate.internal", [{"name": "llm-0", "address": "10.0.0.7", "port": 9443}]
    )
    ours = job_of_pods(made)
    inside = yaml.safe_load((ROOT / "deploy/kubernetes/components/metrics/prometheus.yml").read_text())
    (theirs,) = inside["scrape_configs"]
    for key in ("scheme", "metrics_path", "metric_relabel_configs"):
        assert theirs[key] == ours[key]
    assert theirs["tls_config"].keys() == ours["tls_config"].keys()


def test_disk_and_memory_grow_with_what_serves(tmp_path: Path) -> None:
    pods = [{"name": f"llm-{number}", "address": f"10.0.0.{number}", "port": 9443} for number in range(200)]
    unit = content(watching_pods(tmp_path, "llm.estate.internal", pods), "prometheus.service.d/llmkeep.conf")
    assert "--storage.tsdb.retention.time=90d --storage.tsdb.retention.size=400GB" in unit
    assert "MemoryMax=2000M" in unit


class Pod(BaseHTTPRequestHandler):
    """One with a GPU, which says of other things as well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            b'llm_gpu_utilization_ratio{model="m",gpu="0"} 0.8\nllmkeep_audit_altered 0\nredis_up 0\n'
        )


def test_of_a_pod_its_gateway_and_its_busy_gpu_are_stored_and_nothing_else(tmp_path: Path) -> None:
    keys = ClusterKeys(tmp_path, ["127.0.0.1"])
    keys.issued("ops1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=keys.ca)
    context.load_cert_chain(*keys.issued("llm", server=True))
    context.verify_mode = ssl.CERT_REQUIRED
    with HTTPServer(("127.0.0.1", 0), Pod) as pod:
        pod.socket = context.wrap_socket(pod.socket, server_side=True)
        Thread(target=pod.serve_forever, daemon=True).start()
        where = {"name": "llm-0", "address": "127.0.0.1", "port": pod.server_port}
        job = job_of_pods(watching_pods(tmp_path, "localhost", [where]), tmp_path)
        with prometheus_here(tmp_path, [job]) as query:
            until(lambda: query('up{instance="main.llm-0"} == 1'))
            stored = {
                each["metric"]["__name__"]
                for each in query('{instance="main.llm-0",__name__!~"up|scrape_.+"}')
            }
        pod.shutdown()
    assert stored == {"llm_gpu_busy_ratio"}
