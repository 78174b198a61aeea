"""What role prometheus refuses, and what it makes of an inventory, without a host."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from plugin_modules import ROOT, load
from rendered_role import content, played, rendered

load("filter.prometheus")  # puts the collection where Ansible finds it
# By host: a variable, its value, and what of the message tells that it is refused.
CASES = {
    "tls": ("prometheus_webhook", "https://relay/alerts", ""),
    "loopback": ("prometheus_webhook", "http://127.0.0.1:9099/alerts", ""),
    "bare": ("prometheus_webhook", "http://127.0.0.1", ""),
    "webhook": ("prometheus_mail", {}, ""),
    "unaddressed": ("prometheus_mail", {"to": "a@example.org"}, "lacks from, server"),
    "mail": ("prometheus_webhook", "", ""),
    "plain": ("prometheus_webhook", "http://relay/", "take an https URL"),
    "userinfo": ("prometheus_webhook", "http://127.0.0.1:x@relay/", "take an https URL"),
    "port": ("prometheus_webhook", "http://127.0.0.1:80@relay/", "take an https URL"),
    "suffix": ("prometheus_webhook", "http://127.0.0.1.relay/", "take an https URL"),
    "heartbeat": ("prometheus_heartbeat_webhook", "http://relay/", "take an https URL"),
    "megabytes": ("prometheus_disk", "1500MB", ""),
    "unitless": ("prometheus_disk", "8G", "Take a whole number and one of MB, GB, TB"),
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
           "llmkeep_volume_drill_seconds", "llmkeep_logs_missing", "llmkeep_log_full_seconds")  # fmt: skip


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
