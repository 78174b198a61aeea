"""What role prometheus makes of an estate whose model is served by pods alone."""

from pathlib import Path
from typing import Any

import yaml
from plugin_modules import ROOT
from rendered_role import content, rendered


def watching_pods(folder: Path, server_name: str, pods: list[dict[str, Any]]) -> Any:
    """The files that host ops1 would be given, to watch itself and the pods of cluster `main`."""
    given = {
        "prometheus_webhook": "https://relay/",
        "prometheus_hosts": ["ops1"],
        "prometheus_clusters": [{"name": "main", "server_name": server_name, "pods": pods}],
        "estate_name": "ops1.estate.internal",
        "exporters_port": 9443,
        "llm_serving_gateways": 1,
        "role_path": str(ROOT / "roles/prometheus"),
        "ansible_facts": {"os_family": "Debian"},
    }
    hosts = {"ops1.estate.internal": "10.0.0.1"}
    return rendered(folder, "prometheus", {}, "ops1", hosts, given, {"control": ["ops1"]}, configured=True)


def job_of_pods(made: Any, certificates: Path | None = None) -> dict[str, Any]:
    """The scrape job of cluster `main`. CERTIFICATES: the folder with ca.crt, ops1.crt and ops1.key instead of the host's."""
    text = content(made, "prometheus.yml")
    if certificates:
        for there, here in {"root.pem": "ca.crt", "host.pem": "ops1.crt", "host.key": "ops1.key"}.items():
            text = text.replace(f"/etc/llmkeep/pki/{there}", str(certificates / here))
    jobs: list[dict[str, Any]] = yaml.safe_load(text)["scrape_configs"]
    (found,) = (each for each in jobs if each["job_name"] == "gateway of main")
    return found
