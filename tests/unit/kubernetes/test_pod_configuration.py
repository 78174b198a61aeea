"""The configuration in the manifests: what hosts have, accepted by the programs that read it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from control_plane import kube
from kustomized import FOLDER, Manifest, containers, kustomized, one
from plugin_modules import ROOT
from rendered_role import content, rendered

OVERLAYS = ["overlays/cpu", "overlays/gpu", "overlays/canary", "example"]
CONFIG = FOLDER / "serving/config"
# The journal is a host's; a container's output goes where the cluster's logs go.
JOURNAL = "syslog:server=unix:/run/systemd/journal/dev-log,nohostname,tag=llmkeep_edge"
EDGE = {"edge_port": 8443, "base_ipv6": False, "estate_name": "llm.llmkeep.svc", "llm_serving_gateways": 1}
EDGE |= {"edge_connections": 128, "edge_connections_per_address": 64}  # within the pod's memory
CONNECTION_BYTES = (
    40_000  # of an open connection by TLS 1.3, beside its header buffers: measured, with a margin
)
HOSTS = {"llm1.estate.internal": "10.0.0.12", "ops1.estate.internal": "10.0.0.11"}
GROUPS = {"control": ["ops1"], "mirror": ["ops1"], "serve": ["llm1"], "edge": ["llm1"]}


def test_the_edge_is_configured_as_on_hosts(tmp_path: Path) -> None:
    made = rendered(tmp_path, "edge", {}, "llm1", HOSTS, EDGE, GROUPS, configured=True)
    wanted = content(made, "conf.d/llmkeep-edge.conf")
    assert JOURNAL in wanted
    assert (CONFIG / "edge.conf").read_text() == wanted.replace(JOURNAL, "/dev/stdout").rstrip("\n") + "\n"


def test_nginx_is_configured_as_on_hosts() -> None:
    def settings(text: str) -> set[str]:
        return {re.sub(r"\s+", " ", line.strip()) for line in text.splitlines() if line.strip().endswith(";")}

    ours = settings((CONFIG / "nginx.conf").read_text())
    theirs = settings((ROOT / "roles/_common/templates/nginx.conf.j2").read_text())
    assert {re.split(r"[ ;]", each)[0] for each in theirs - ours} == {
        "user",  # the pod's is none that may choose
        "worker_processes",
        "ssl_certificate",
        "ssl_certificate_key",
        "include",
        "keepalive_timeout",  # as long as a pod that leaves can wait
        "worker_connections",  # as many as its memory holds: no firewall counts them by address
        "client_header_timeout",
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_number_of_clients_has_the_edge_use_more_memory_than_it_may(overlay: str) -> None:
    """As many connections as nginx takes, with heads that never end; and as many requests, with bodies that never end."""
    edge, nginx = (CONFIG / "edge.conf").read_text(), (CONFIG / "nginx.conf").read_text()

    def number(text: str, name: str) -> int:
        return int(re.findall(rf"^\s*{name}(?: llmkeep_all)? (\d+)[; ]", text, re.M)[0])

    connections = number(nginx, "worker_processes") * number(nginx, "worker_connections")
    buffers, kilobytes = map(int, re.findall(r"large_client_header_buffers (\d+) (\d+)k;", edge)[0])
    heads = connections * (CONNECTION_BYTES + buffers * kilobytes * 1024)
    bodies = number(edge, "limit_conn") * number(edge, "client_body_buffer_size")
    limit = containers(one(kustomized(overlay), "StatefulSet")["spec"]["template"]["spec"])["edge"][
        "resources"
    ]["limits"]
    assert heads + bodies < int(limit["memory"].removesuffix("Mi")) << 20


def test_metrics_are_shown_as_on_hosts(tmp_path: Path) -> None:
    given = {"exporters_port": 9443, "estate_name": "llm1.estate.internal", "llm_serving_gateways": 1}
    given |= {"llm_serving_metrics_port": 9464, "edge_port": 443, "gpu_health_metrics_port": 9410}
    given |= {"role_path": str(ROOT / "roles/exporters"), "ansible_facts": {"os_family": "Debian"}}
    groups = {**GROUPS, "prometheus": ["ops1"]}
    made = rendered(tmp_path, "exporters", {}, "llm1", HOSTS, given, groups, configured=True)

    def shown(text: str) -> set[str]:
        """Words of the server and of what it shows of the gateway, but not those that differ for a pod."""
        server = text[text.index("server {") :]
        (gateway,) = re.findall(r"location = /gateway-1 .*?\n    }", server, re.S)
        lines = (server[: server.index("location = ")] + gateway).splitlines()
        own = ("#", "listen", "server_name", "ssl_client_certificate", "if (")
        return {line.strip() for line in lines if not line.strip().startswith(own)}

    ours = shown((FOLDER / "components/metrics/metrics.conf").read_text())
    theirs = shown(content(made, "inside.d/llmkeep-exporters.conf"))
    assert theirs - ours == {"ssl_crl /etc/llmkeep/pki/crl.pem;"}  # metrics.conf says why
    assert not ours - theirs


@pytest.mark.parametrize(
    ("overlay", "scraped_by"), [("overlays/cpu", ""), ("overlays/cpu", "ops1"), ("overlays/gpu", "ops1")]
)
def test_each_port_is_open_to_namespaces_with_its_own_label(overlay: str, scraped_by: str) -> None:
    manifests = kustomized(overlay, scraped_by)
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    (denying,) = (each for each in policies if each["podSelector"] == {})
    assert denying == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    opened = {
        rule["ports"][0]["port"]: [each["namespaceSelector"]["matchLabels"] for each in rule["from"]]
        for each in policies
        for rule in each.get("ingress", [])
    }
    edge = containers(one(manifests, "StatefulSet")["spec"]["template"]["spec"])["edge"]
    ports = {each["name"]: each["containerPort"] for each in edge["ports"]}
    assert ports == {"https": 8443} | ({"metrics": 9443} if scraped_by else {})
    labels = {"https": {"llmkeep.org/clients": "allowed"}, "metrics": {"llmkeep.org/metrics": "allowed"}}
    assert opened == {number: [labels[name]] for name, number in ports.items()}
    assert not any("egress" in each for each in policies)


def test_opa_lets_in_what_it_lets_in_on_hosts() -> None:
    assert (CONFIG / "authz.rego").read_bytes() == (ROOT / "roles/opa/files/authz.rego").read_bytes()


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("kind", ["gateway", "engine"])
def test_the_program_accepts_its_configuration(tmp_path: Path, overlay: str, kind: str) -> None:
    file = tmp_path / f"{kind}.yaml"
    file.write_text(config(kustomized(overlay), kind))
    argv = [str(ROOT / "payload/.venv/bin/llm-serve"), "check", kind, str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def config(manifests: list[Manifest], kind: str) -> str:
    """The file that a container reads, from the ConfigMap that its volume names."""
    volumes = one(manifests, "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    (name,) = (each["configMap"]["name"] for each in volumes if each["name"] == kind)
    (held,) = (each for each in manifests if each["metadata"]["name"] == name)
    text: str = held["data"][f"{kind}.yaml"]
    return text


@pytest.mark.parametrize("component", ["cpu", "gpu"])
def test_an_overlay_keeps_its_own_engine_beside_a_component(tmp_path: Path, component: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes/example/kustomization.yaml"
    file.write_text(file.read_text().replace("../components/cpu", f"../components/{component}"))
    argv = [str(kube()), "kubectl", "kustomize", str(file.parent)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    held = config(list(yaml.safe_load_all(done.stdout)), "engine")
    assert held == (FOLDER / "example/engine.yaml").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gateway_and_engine_mean_the_same_model_and_socket(overlay: str) -> None:
    manifests = kustomized(overlay)
    gateway, engine = (yaml.safe_load(config(manifests, kind)) for kind in ("gateway", "engine"))
    ((name, reached),) = gateway["engines"].items()
    assert (name, reached.get("remote", reached)["socket"]) == (engine["name"], engine["socket"])
    assert ("remote" in reached) == (engine["model"]["driver"] == "vllm")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_sidecars_start_in_their_order(overlay: str) -> None:
    spec = one(kustomized(overlay), "StatefulSet")["spec"]["template"]["spec"]
    assert list(containers(spec)) == ["policy", "opa", "audit", "engine", "edge", "gateway"]
    assert {each["restartPolicy"] for each in spec["initContainers"]} == {"Always"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_socket_is_in_two_containers_and_only_its_server_can_replace_it(overlay: str) -> None:
    spec = one(kustomized(overlay), "StatefulSet")["spec"]["template"]["spec"]
    for server, client in (
        ("opa", "gateway"),
        ("audit", "gateway"),
        ("engine", "gateway"),
        ("gateway", "edge"),
    ):
        mounted = {
            name: each.get("readOnly", False)
            for name, container in containers(spec).items()
            for each in container["volumeMounts"]
            if each["name"] == f"run-{server}"
        }
        assert mounted == {server: False, client: True}


def test_each_grace_is_longer_than_the_drain() -> None:
    for overlay in OVERLAYS:
        manifests = kustomized(overlay)
        spec = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
        waits = containers(spec)["gateway"]["lifecycle"]["preStop"]["sleep"]["seconds"]
        drains = yaml.safe_load(config(manifests, "gateway"))["limits"]["drain_seconds"]
        engine = yaml.safe_load(config(manifests, "engine"))
        # Our engines have drained when the gateway has; vLLM drains by itself.
        after = engine["drain_seconds"] if engine["model"]["driver"] == "vllm" else 0
        assert spec["terminationGracePeriodSeconds"] >= waits + drains + after + 10, overlay


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_that_leaves_waits_for_connections_that_are_kept(overlay: str) -> None:
    found = containers(one(kustomized(overlay), "StatefulSet")["spec"]["template"]["spec"])
    nginx = (CONFIG / "nginx.conf").read_text()
    kept = sum(int(re.findall(rf"keepalive_{each} (\d+)s;", nginx)[0]) for each in ("time", "timeout"))
    quits = found["edge"]["lifecycle"]["preStop"]["exec"]["command"][-1]
    drains = found["gateway"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert kept < int(re.findall(r"sleep (\d+);", quits)[0]) < drains


def test_a_canary_shares_service_and_budget_but_no_pod_of_the_others() -> None:
    cpu, canary = kustomized("overlays/cpu"), kustomized("overlays/canary")
    stable, other = one(cpu, "StatefulSet"), one(canary, "StatefulSet")
    labels = other["spec"]["template"]["metadata"]["labels"]
    for shared in (
        one(cpu, "Service")["spec"]["selector"],
        one(cpu, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert shared.items() <= labels.items()
    assert not stable["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert (
        not other["spec"]["selector"]["matchLabels"].items()
        <= stable["spec"]["template"]["metadata"]["labels"].items()
    )
    assert {each["kind"] for each in canary} == {"ConfigMap", "StatefulSet"}
    assert "llmkeep.org/track" not in json.dumps(one(cpu, "Service"))


def test_a_gpu_overlay_is_the_base_but_for_vllm() -> None:
    """The two gateway.yaml are equal but for how the engine is reached."""
    base, gpu = (
        yaml.safe_load(config(kustomized(each), "gateway")) for each in ("overlays/cpu", "overlays/gpu")
    )
    assert base.pop("engines").keys() == gpu.pop("engines").keys()
    assert base == gpu


def test_gpus_are_asked_for_by_the_engine_alone() -> None:
    spec = one(kustomized("overlays/gpu"), "StatefulSet")["spec"]["template"]["spec"]
    asking = {
        name for name, each in containers(spec).items() if "nvidia.com/gpu" in each["resources"]["limits"]
    }
    assert asking == {"engine"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_with_a_group_has_a_user(overlay: str) -> None:
    """As containerd's CRI wants it for the pod's first container, whose user no container of ours says."""
    pod = one(kustomized(overlay), "StatefulSet")["spec"]["template"]["spec"]["securityContext"]
    assert {"runAsUser", "runAsGroup"} <= pod.keys()
