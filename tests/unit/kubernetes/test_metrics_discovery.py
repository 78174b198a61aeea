"""The scrape configuration for a Prometheus in the cluster finds each pod of the manifests, by the real API server."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml
from control_plane import ControlPlane
from kustomized import FOLDER, kustomized, one
from waiting import until

IN = "--namespace=llmkeep"
ADDRESS = "10.244.0.7"
SCRAPE = FOLDER / "components/metrics/prometheus.yml"


def found(cluster: ControlPlane, folder: Path) -> list[dict[str, str]]:
    """Labels of what Prometheus would scrape, by an account that may read pods of the namespace and no more."""
    config: dict[str, Any] = yaml.safe_load(SCRAPE.read_text())
    (job,) = config["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    discovery["kubeconfig_file"] = str(cluster.identity("prometheus", []))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    argv = [
        "promtool",
        "check",
        "service-discovery",
        "--timeout=30s",
        str(folder / "prometheus.yml"),
        "gateway",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return [each["labels"] for each in json.loads(done.stdout) if each.get("labels")]


def test_prometheus_accepts_the_configuration() -> None:
    check = ["promtool", "check", "config", "--syntax-only", str(SCRAPE)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_pod_is_one_target_at_its_port_for_metrics(cluster: ControlPlane, tmp_path: Path) -> None:
    manifests = kustomized("overlays/cpu", scraped_by="prometheus")
    one(manifests, "StatefulSet")["spec"]["replicas"] = 1
    applied = ["apply", "--server-side", "--force-conflicts", "-f", "-"]
    cluster.kubectl(*applied, stdin=json.dumps(one(manifests, "Namespace")))
    cluster.kubectl("delete", "statefulset,pod", "--all", IN, "--grace-period=0", "--force")
    cluster.kubectl(*applied, stdin=yaml.safe_dump_all(manifests))
    cluster.kubectl("create", "role", "prometheus", IN, "--verb=get,list,watch", "--resource=pods")
    cluster.kubectl("create", "rolebinding", "prometheus", IN, "--role=prometheus", "--user=prometheus")
    until(lambda: cluster.attempted("get", "pod/llm-0", IN).returncode == 0)
    # As kubelet says it, of which there is none.
    status = json.dumps({"status": {"podIP": ADDRESS, "podIPs": [{"ip": ADDRESS}]}})
    cluster.kubectl("patch", "pod/llm-0", IN, "--subresource=status", "--type=merge", "--patch", status)
    (labels,) = found(cluster, tmp_path)
    assert {name: labels[name] for name in ("__address__", "__scheme__", "__metrics_path__")} == {
        "__address__": f"{ADDRESS}:9443",
        "__scheme__": "https",
        "__metrics_path__": "/gateway-1",
    }
    assert {name: value for name, value in labels.items() if not name.startswith("__")} == {
        "job": "gateway",
        "instance": "main.llm-0",
        "cluster": "main",
        "gateway": "1",
    }
