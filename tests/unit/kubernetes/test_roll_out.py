"""Roll-outs, drains and spread of the manifests' pods, by the real controllers and scheduler, over hollow nodes."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest
import yaml
from control_plane import ControlPlane, kube
from hollow_nodes import hollow_nodes, ready
from kustomized import Manifest, containers, kustomized, one
from namespaces import namespace
from waiting import until

NODES, REPLICAS = 2, 4
STORM_NODES, STORM_REPLICAS, STORM_AT_ONCE, STORM_SECONDS = 10, 1000, 50, 3600
SECONDS = 120
MANY = 100
TINY = {"cpu": "1m", "memory": "1Mi"}  # a hollow node has one processor
IN = "--namespace=llmkeep"
WORKLOAD = "statefulset/llm"
SELECTED = "--selector=app.kubernetes.io/name=llm"


def volumes(replicas: int) -> Iterator[Manifest]:
    """One for each claim, on any node."""
    for number in range(replicas):
        for claim, mode, storage in (
            ("weights", "ReadOnlyMany", "llmkeep-weights"),
            ("record", "ReadWriteOncePod", ""),
            ("state", "ReadWriteOncePod", ""),
        ):
            spec = {
                "accessModes": [mode],
                "capacity": {"storage": "10Gi"},
                "hostPath": {"path": "/nowhere"},
                "storageClassName": storage,
                "claimRef": {"namespace": "llmkeep", "name": f"{claim}-llm-{number}"},
            }
            metadata = {"name": f"{claim}-{number}"}
            yield {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec}


def given() -> Iterator[Manifest]:
    """The Secrets and the ConfigMap that no manifest defines."""
    for kind, names in {
        "Secret": ["llm-gateway", "llm-audit", "llm-keys", "llm-edge-tls"],
        "ConfigMap": ["llm-policy"],
    }.items():
        for name in names:
            yield {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "llmkeep"}}


def applied(cluster: ControlPlane, manifests: list[Manifest]) -> None:
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(manifests))


def deployed(cluster: ControlPlane, replicas: int, unavailable: int = 1, seconds: int = SECONDS) -> Manifest:
    """The overlay `cpu` with so many replicas, all of them ready; returns the StatefulSet."""
    manifests = kustomized("overlays/cpu")
    workload = one(manifests, "StatefulSet")
    assert workload["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1}
    workload["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] = unavailable
    workload["spec"]["replicas"] = replicas
    workload["spec"]["minReadySeconds"] = 0
    pod = workload["spec"]["template"]["spec"]
    # A hollow node has nothing to execute for a probe, and starts no second sidecar: all its containers are ordinary ones.
    pod["containers"] = list(containers(pod).values())
    del pod["initContainers"]
    for each in pod["containers"]:
        for absent in "startupProbe", "livenessProbe", "restartPolicy":
            each.pop(absent, None)
        each["resources"] = {"requests": TINY, "limits": {"memory": "4Gi"}}
        if "lifecycle" in each:
            each["lifecycle"] = {"preStop": {"sleep": {"seconds": 1}}}
    if replicas > MANY:  # three thousand volumes take longer than all else
        claims = workload["spec"].pop("volumeClaimTemplates")
        pod["volumes"] += [{"name": each["metadata"]["name"], "emptyDir": {}} for each in claims]
    applied(cluster, [one(manifests, "Namespace")])
    # A pod that lacks one is tried again only after a while.
    applied(cluster, [*given(), *([] if replicas > MANY else volumes(replicas))])
    applied(cluster, manifests)
    is_out(cluster, seconds)
    return workload


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlPlane, Manifest]]:
    """A cluster with the manifests' pods, all ready, and their StatefulSet, which tests leave as they found it."""
    kube()
    try:
        os.close(namespace())
    except OSError as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    with hollow_nodes(tmp_path_factory.mktemp("hollow"), NODES, 8443) as cluster:
        yield cluster, deployed(cluster, REPLICAS)


@contextmanager
def watched(cluster: ControlPlane) -> Iterator[list[int]]:
    """How many replicas were ready after each change within the block."""
    argv = [str(cluster.program), "kubectl", "--kubeconfig", str(cluster.kubeconfig)]
    argv += ["get", WORKLOAD, IN, "--watch", '--output=jsonpath={.status.readyReplicas}{"\\n"}']
    seen: list[int] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout

        def read() -> None:
            seen.extend(int(line or 0) for line in process.stdout or [])

        thread = Thread(target=read)
        thread.start()
        try:
            yield seen
        finally:
            process.terminate()
            thread.join()


def rolled_out(cluster: ControlPlane, workload: Manifest, path: str = "/readyz") -> None:
    """Another revision, which asks its probes for PATH."""
    template = workload["spec"]["template"]
    annotations = template["metadata"].setdefault("annotations", {})
    annotations["revision"] = str(int(annotations.get("revision", 0)) + 1)
    (edge,) = (each for each in template["spec"]["containers"] if each["name"] == "edge")
    edge["readinessProbe"]["httpGet"]["path"] = path
    applied(cluster, [workload])


def is_out(cluster: ControlPlane, seconds: int = SECONDS) -> None:
    """Wait until all replicas have the last revision and are ready."""
    cluster.kubectl("rollout", "status", WORKLOAD, IN, f"--timeout={seconds}s")


def placed(cluster: ControlPlane) -> Counter[str]:
    """How many pods each node has."""
    pods = json.loads(cluster.kubectl("get", "pods", IN, SELECTED, "--output=json"))["items"]
    return Counter(each["spec"].get("nodeName", "") for each in pods)


def test_replicas_are_spread_over_the_nodes_and_roll_out_one_at_a_time(
    nodes: tuple[ControlPlane, Manifest],
) -> None:
    cluster, workload = nodes
    assert set(placed(cluster).values()) == {REPLICAS // NODES}
    with watched(cluster) as seen:
        until(lambda: seen)
        rolled_out(cluster, workload)
        is_out(cluster)
    assert min(seen) == REPLICAS - 1
    assert set(placed(cluster).values()) == {REPLICAS // NODES}


def test_a_revision_that_does_not_become_ready_takes_one_replica(
    nodes: tuple[ControlPlane, Manifest],
) -> None:
    cluster, workload = nodes
    rolled_out(cluster, workload, "/broken")
    for field, value in ("updatedReplicas", 1), ("readyReplicas", REPLICAS - 1):
        wanted = f"--for=jsonpath={{.status.{field}}}={value}"
        cluster.kubectl("wait", WORKLOAD, IN, wanted, f"--timeout={SECONDS}s")
    budget = json.loads(cluster.kubectl("get", "poddisruptionbudget/llm", IN, "--output=json"))["status"]
    assert budget["disruptionsAllowed"] == 0
    # What goes back has to end the pod that never became ready: the controller waits for it.
    rolled_out(cluster, workload)
    cluster.kubectl("delete", "pod", f"llm-{REPLICAS - 1}", IN)
    is_out(cluster)


def test_drains_take_one_replica_at_a_time(nodes: tuple[ControlPlane, Manifest]) -> None:
    cluster, _ = nodes
    names = [f"hollow-{number}" for number in range(NODES)]
    cluster.kubectl("cordon", *names)
    said = cluster.refused("drain", "--delete-emptydir-data", "--timeout=10s", names[0])
    assert "violate the pod's disruption budget" in said
    assert ready(cluster, "pods", IN, SELECTED) == REPLICAS - 1
    cluster.kubectl("uncordon", *names)
    is_out(cluster)


@pytest.mark.skipif("STORM" not in os.environ, reason="minutes: `make storm`")
def test_a_thousand_replicas_roll_out_within_the_budget(tmp_path_factory: pytest.TempPathFactory) -> None:
    with hollow_nodes(tmp_path_factory.mktemp("storm"), STORM_NODES, 8443) as cluster:
        workload = deployed(cluster, STORM_REPLICAS, STORM_AT_ONCE, STORM_SECONDS)
        assert set(placed(cluster).values()) == {STORM_REPLICAS // STORM_NODES}
        with watched(cluster) as seen:
            until(lambda: seen)
            rolled_out(cluster, workload)
            is_out(cluster, STORM_SECONDS)
        assert STORM_REPLICAS - STORM_AT_ONCE <= min(seen) < STORM_REPLICAS
