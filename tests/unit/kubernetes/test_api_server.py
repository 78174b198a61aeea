"""The manifests and the real API server: it admits each, refuses each pod that breaks a rule, and names pods to Prometheus."""

import http.client
import json
import re
import ssl
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from control_plane import ControlPlane, control_plane
from kustomized import DIGEST, FOLDER, IMAGE, Manifest, kustomized, one, pod
from waiting import until

OVERLAYS = ["overlays/cpu", "overlays/gpu", "overlays/canary", "example"]
VERSION = "1.37"
OTHER = f"docker.io/library/nginx@{DIGEST}"
IN = "--namespace=llmkeep"
ADDRESS = "10.244.0.7"
SCRAPE = FOLDER / "components/metrics/prometheus.yml"
Break = Callable[[Manifest], object]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real control plane without nodes."""
    with control_plane(tmp_path_factory.mktemp("cluster") / "control-plane") as running:
        yield running


def connected(cluster: ControlPlane, context: ssl.SSLContext) -> int:
    link = http.client.HTTPSConnection(cluster.address, cluster.port, context=context, timeout=30)
    link.request("GET", "/api/v1/namespaces")
    return link.getresponse().status


def test_a_deployment_gets_its_pods(cluster: ControlPlane) -> None:
    cluster.kubectl("create", "deployment", "web", "--image=registry.local/web:1", "--replicas=2")
    cluster.kubectl("wait", "--for=create", "pod", "--selector=app=web", "--timeout=60s")


def test_a_user_without_rights_is_forbidden(cluster: ControlPlane) -> None:
    visitor = cluster.identity("visitor", ["visitors"])
    with pytest.raises(AssertionError, match=r"Forbidden.*visitor"):
        cluster.kubectl("get", "pods", kubeconfig=visitor)


def test_a_client_without_a_certificate_is_unauthorized(cluster: ControlPlane) -> None:
    assert connected(cluster, ssl.create_default_context(cafile=cluster.keys.ca)) == 401


def test_older_tls_than_1_3_is_refused(cluster: ControlPlane) -> None:
    context = ssl.create_default_context(cafile=cluster.keys.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        connected(cluster, context)


@pytest.fixture(scope="module")
def guarded(cluster: ControlPlane) -> ControlPlane:
    """A cluster in which the overlay `cpu` was applied, and its policies hold."""
    manifests = kustomized("overlays/cpu")
    namespace = one(manifests, "Namespace")
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(namespace))
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    tagged, with_token = good(), good()
    main(tagged, image=f"{IMAGE}:1")
    spec(with_token, automountServiceAccountToken=True)
    # The API server takes policies in a moment later: until then, such pods would be admitted.
    until(lambda: refusal(cluster, tagged) and refusal(cluster, with_token))
    return cluster


RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
}


def good() -> Manifest:
    return pod(kustomized("overlays/cpu"))


def refusal(cluster: ControlPlane, wrong: Manifest) -> str:
    """What the API server says of creating a pod; "" if it would."""
    done = cluster.attempted("create", "--dry-run=server", "-f", "-", stdin=json.dumps(wrong))
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_of_an_overlay_is_admitted(guarded: ControlPlane, overlay: str) -> None:
    guarded.kubectl("delete", "statefulsets", "--all", "--namespace=llmkeep")  # sizes of claims are for ever
    manifests = yaml.safe_dump_all(kustomized(overlay))
    applied = ["apply", "--server-side", "--force-conflicts", "-f", "-"]
    guarded.kubectl(*applied, "--dry-run=server", stdin=manifests)
    guarded.kubectl(*applied, stdin=manifests)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_server_keeps_every_field(guarded: ControlPlane, overlay: str) -> None:
    manifests = kustomized(overlay)
    for each in manifests:
        each["metadata"]["name"] += "-again"  # a name that is free
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    options = ["--dry-run=server", "--validate=strict", "--output=yaml"]
    said = yaml.safe_load_all(guarded.kubectl("create", *options, "-f", "-", stdin=text))
    kept = {(each["kind"], each["metadata"]["name"]): each for each in said}
    for each in manifests:
        name = each["kind"], each["metadata"]["name"]
        assert not missing(each, kept[name]), name


def missing(wanted: object, found: object, path: str = "") -> list[str]:
    """Where FOUND is not what was wanted; what the server adds does not count."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            each
            for key, value in wanted.items()
            for each in (missing(value, found[key], f"{path}.{key}") if key in found else [f"{path}.{key}"])
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = zip(wanted, found, strict=True)
        return [each for index, (a, b) in enumerate(pairs) for each in missing(a, b, f"{path}[{index}]")]
    return [] if wanted == found else [path]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_published_schemas_know_every_field(overlay: str) -> None:
    for manifest in kustomized(overlay):
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_published_schemas_see_a_misspelt_field() -> None:
    wrong = good()
    wrong["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_no_overlay_has_a_secret() -> None:
    for overlay in OVERLAYS:
        assert "Secret" not in {each["kind"] for each in kustomized(overlay)}


def test_the_policies_have_no_warnings(guarded: ControlPlane) -> None:
    def checked() -> list[Manifest]:
        said = json.loads(guarded.kubectl("get", "validatingadmissionpolicies", "-o", "json"))
        ours = [each for each in said["items"] if each["metadata"]["name"].startswith("llmkeep-")]
        return ours if all("typeChecking" in each.get("status", {}) for each in ours) else []

    until(checked)
    assert [each["status"]["typeChecking"] for each in checked()] == [{}, {}]


def test_a_pod_of_the_manifest_is_admitted(guarded: ControlPlane) -> None:
    assert refusal(guarded, good()) == ""


def init(wrong: Manifest, **more: object) -> None:
    wrong["spec"]["initContainers"][0].update(more)


def main(wrong: Manifest, **more: object) -> None:
    wrong["spec"]["containers"][0].update(more)


def main_secured(wrong: Manifest, **more: object) -> None:
    wrong["spec"]["containers"][0]["securityContext"].update(more)


def init_secured(wrong: Manifest, **more: object) -> None:
    wrong["spec"]["initContainers"][0]["securityContext"].update(more)


def secured(wrong: Manifest, **more: object) -> None:
    wrong["spec"]["securityContext"].update(more)


def spec(wrong: Manifest, **more: object) -> None:
    wrong["spec"].update(more)


def volume(wrong: Manifest, **source: object) -> None:
    wrong["spec"]["volumes"].append({"name": "more", **source})


def without(wrong: Manifest, path: list[str]) -> None:
    """The pod without a field."""
    at: Any = wrong["spec"]
    for each in path[:-1]:
        at = at[each]
    del at[path[-1]]


SECRET = {"secretKeyRef": {"name": "llm-gateway", "key": "llm-gateway.pepper"}}
TOKEN = {"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
PORT = {"containerPort": 8443, "hostPort": 8443}
CHANGED: dict[str, tuple[Break, str]] = {
    "a tag": (partial(main, image=f"{IMAGE}:1.0"), "without a digest: .*1.0. Name each as NAME@sha256"),
    "a tag beside the digest, in a registry with a port": (
        partial(main, image=f"localhost:5000/llmkeep@{DIGEST}"),
        "another registry: localhost:5000.*Copy each into registry.llmkeep.internal",
    ),
    "no tag": (partial(main, image=IMAGE), "without a digest: .*image.json"),
    "a short digest": (partial(main, image=f"{IMAGE}@sha256:5e5e"), "without a digest"),
    "a tag in a sidecar": (partial(init, image=f"{IMAGE}:latest"), "without a digest: .*:latest"),
    "a foreign registry": (partial(main, image=OTHER), "another registry: docker.io"),
    "a registry whose name begins alike": (
        partial(main, image=f"registry.llmkeep.internal.example.org/llmkeep@{DIGEST}"),
        "another registry: registry.llmkeep.internal.example.org",
    ),
    "a foreign registry in a sidecar": (partial(init, image=OTHER), "another registry: docker.io"),
    "a foreign image as a volume": (
        partial(volume, image={"reference": OTHER, "pullPolicy": "IfNotPresent"}),
        "another registry: docker.io",
    ),
    "a tagged image as a volume": (partial(volume, image={"reference": f"{IMAGE}:1"}), "without a digest"),
    "a writable root": (
        partial(main_secured, readOnlyRootFilesystem=False),
        "writable root.*gateway.*emptyDir",
    ),
    "a writable root in a sidecar": (
        partial(init_secured, readOnlyRootFilesystem=False),
        "writable root.*policy",
    ),
    "no limit of memory": (partial(main, resources={}), "without a limit of memory: gateway. Set resources"),
    "no limit of memory in a sidecar": (
        partial(init, resources={"limits": {"cpu": "1"}}),
        "without a limit of memory: policy",
    ),
    "a secret in the environment": (
        partial(main, env=[{"name": "PEPPER", "valueFrom": SECRET}]),
        "Secret in their environment: gateway",
    ),
    "a secret as the environment": (
        partial(init, envFrom=[{"secretRef": {"name": "llm-audit"}}]),
        "Secret in their environment: policy",
    ),
    "a token": (partial(spec, automountServiceAccountToken=True), "automountServiceAccountToken: false"),
    "no word of a token": (
        partial(without, path=["automountServiceAccountToken"]),
        "automountServiceAccountToken: false",
    ),
    "a projected token": (partial(volume, **TOKEN), "project no serviceAccountToken"),
    "privileged": (partial(main_secured, privileged=True, allowPrivilegeEscalation=True), "privileged"),
    "privilege escalation": (
        partial(main_secured, allowPrivilegeEscalation=True),
        "allowPrivilegeEscalation",
    ),
    "an added capability": (
        partial(main_secured, capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}),
        "NET_ADMIN",
    ),
    "a kept capability": (partial(init_secured, capabilities={}), "unrestricted capabilities"),
    "root": (partial(main_secured, runAsUser=0), "runAsUser=0"),
    "root in a sidecar": (partial(init_secured, runAsUser=0), "runAsUser=0"),
    "no word against root": (
        partial(without, path=["securityContext", "runAsNonRoot"]),
        "runAsNonRoot != true",
    ),
    "no seccomp": (partial(without, path=["securityContext", "seccompProfile"]), "seccompProfile"),
    "seccomp off": (partial(main_secured, seccompProfile={"type": "Unconfined"}), "seccompProfile"),
    "a folder of the host": (partial(volume, hostPath={"path": "/"}), "hostPath"),
    "a share of another host": (partial(volume, nfs={"server": "h", "path": "/"}), "restricted volume types"),
    "the host's network": (partial(spec, hostNetwork=True), "host namespaces"),
    "the host's processes": (partial(spec, hostPID=True), "host namespaces"),
    "a port of the host": (partial(main, ports=[PORT]), "hostPort"),
    "a sysctl": (partial(secured, sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "forbidden sysctls"),
}


@pytest.mark.parametrize(("changed", "why"), CHANGED.values(), ids=CHANGED)
def test_a_pod_that_breaks_a_rule_is_refused(guarded: ControlPlane, changed: Break, why: str) -> None:
    wrong = good()
    changed(wrong)
    said = refusal(guarded, wrong)
    assert said, "it was admitted"
    assert re.search(why, said), said


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"image": OTHER}, "another registry: docker.io"),
        ({"image": f"{IMAGE}:debug"}, "without a digest: .*:debug"),
        ({"securityContext": RESTRICTED}, "writable root file system: debug"),
        ({"env": [{"name": "PEPPER", "valueFrom": SECRET}]}, "Secret in their environment: debug"),
        ({"securityContext": {"readOnlyRootFilesystem": True}}, "allowPrivilegeEscalation"),
    ],
    ids=["a foreign registry", "a tag", "a writable root", "a secret in the environment", "not restricted"],
)
def test_an_ephemeral_container_is_held_to_the_same_rules(
    guarded: ControlPlane, changed: Manifest, why: str
) -> None:
    running = good()
    running["metadata"]["name"] = "debugged"
    guarded.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(running))
    hardened = {**RESTRICTED, "readOnlyRootFilesystem": True}
    right = {"name": "debug", "image": f"{IMAGE}@{DIGEST}", "securityContext": hardened}
    target = ["patch", "pod", "debugged", "--namespace=llmkeep", "--subresource=ephemeralcontainers"]

    def added(container: Manifest) -> list[str]:
        patch = json.dumps({"spec": {"ephemeralContainers": [container]}})
        return [*target, "--type=strategic", "--patch", patch, "--dry-run=server"]

    said = guarded.refused(*added(right | changed))
    assert re.search(why, said), said
    guarded.kubectl(*added(right))


def test_other_namespaces_are_not_judged(guarded: ControlPlane) -> None:
    guarded.kubectl("run", "theirs", "--image=nginx", "--namespace=default", "--dry-run=server")


def test_no_pod_is_admitted_while_the_registry_is_not_named(guarded: ControlPlane) -> None:
    images = json.loads(guarded.kubectl("get", "configmap/llm-images", "--namespace=llmkeep", "-o", "json"))
    guarded.kubectl("delete", "configmap/llm-images", "--namespace=llmkeep")
    try:
        until(lambda: "params" in refusal(guarded, good()))
    finally:
        kept = {key: images[key] for key in ("apiVersion", "kind", "data")}
        kept["metadata"] = {"name": "llm-images", "namespace": "llmkeep"}
        guarded.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(kept))
        until(lambda: refusal(guarded, good()) == "")


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
