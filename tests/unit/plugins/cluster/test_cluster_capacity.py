"""Module cluster_manifests: a cluster that lacks what manifests need is refused, and nothing is changed there."""

import json

import pytest
from cluster_overlay import Manifest, signed_image
from deployed_cluster import NODE, Estate, stateful
from plugin_modules import ROOT, load

capacity = load("module_utils.cluster.capacity")


def test_a_cluster_that_is_too_old_is_refused(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "OLDEST", (1, 99))
    assert "runs Kubernetes v1.37.2, and manifests need 1.99 or later" in estate.refused()
    assert estate.untouched()


def test_a_kind_that_the_cluster_does_not_serve_is_refused(estate: Estate) -> None:
    estate.objects["ServiceMonitor"] = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": "serving", "namespace": estate.namespace},
    }
    assert "does not serve ServiceMonitor (monitoring.coreos.com/v1)" in estate.refused()
    assert estate.untouched()


def gpus(estate: Estate, count: int, variant: str = "cuda") -> None:
    signed_image(estate.folder, estate.keys, variant=variant)
    estate.pod["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": count}}


@pytest.mark.parametrize(
    ("each", "pods", "said"),
    [
        (9, 1, "no node has more than 8 allocatable"),
        (3, 3, "9 nvidia.com/gpu are declared, and the nodes have 8"),
    ],
)
def test_more_gpus_than_nodes_have_are_refused(estate: Estate, each: int, pods: int, said: str) -> None:
    gpus(estate, each)
    assert said in estate.refused(replicas={"serving": pods})
    assert estate.untouched()


def test_more_gpus_than_the_quota_leaves_are_refused(estate: Estate) -> None:
    gpus(estate, 2)
    estate.cluster.kubectl("create", "namespace", estate.namespace)
    estate.cluster.kubectl(
        "create", "quota", "gpus", "--hard=requests.nvidia.com/gpu=1", "-n", estate.namespace
    )
    estate.cluster.kubectl(
        "wait",
        "quota/gpus",
        "--for=jsonpath={.status.hard.requests\\.nvidia\\.com/gpu}=1",
        "-n",
        estate.namespace,
    )
    assert "ResourceQuota gpus allows 1, of which others use 0" in estate.refused()
    assert estate.names("deployment") == []


def test_gpus_that_workloads_of_llmkeep_have_are_not_asked_for_twice(estate: Estate) -> None:
    gpus(estate, 2)
    estate.cluster.kubectl("create", "namespace", estate.namespace)
    estate.cluster.kubectl(
        "create", "quota", "gpus", "--hard=requests.nvidia.com/gpu=2", "-n", estate.namespace
    )
    estate.deployed()
    assert not estate.deployed()["changed"]


def test_gpus_for_an_image_that_does_not_compute_on_them_are_refused(estate: Estate) -> None:
    gpus(estate, 1, variant="cpu")
    assert "the signed image is of the variant cpu" in estate.refused()
    assert estate.untouched()


def test_a_runtime_class_that_the_cluster_lacks_is_refused(estate: Estate) -> None:
    estate.pod["runtimeClassName"] = "nvidia"
    assert "has the runtime class nvidia, and the cluster has none. Make it" in estate.refused()
    assert estate.untouched()


def volume(name: str, storage_class: str, node: str) -> Manifest:
    """The verified release on a node."""
    hosts = [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": storage_class,
            "local": {"path": "/srv/llmkeep/models"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": hosts}]}},
        },
    }


@pytest.mark.parametrize(("node", "replicas", "having"), [("other", 1, 0), (NODE, 2, 1)])
def test_a_replica_without_a_node_that_has_the_release_is_refused(
    estate: Estate, node: str, replicas: int, having: int
) -> None:
    name = estate.namespace
    claim = {
        "accessModes": ["ReadOnlyMany"],
        "storageClassName": name,
        "resources": {"requests": {"storage": "1Gi"}},
    }
    stateful(estate)["spec"]["volumeClaimTemplates"] = [{"metadata": {"name": "weights"}, "spec": claim}]
    estate.objects["StorageClass"] = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    estate.objects["PersistentVolume"] = volume(name, name, node)
    said = estate.refused(replicas={"serving": replicas})
    assert f"has {replicas} replicas, and {having} volumes with the verified release" in said
    assert estate.untouched()


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ("cpu", "StatefulSet llmkeep/llm has 2 replicas, and 0 volumes with the verified release"),
        ("gpu", "StatefulSet llmkeep/llm asks for GPUs, and the signed image is of the variant cpu"),
    ],
)
def test_the_manifests_of_git_are_judged(estate: Estate, overlay: str, said: str) -> None:
    assert said in estate.refused(overlay=str(ROOT / "deploy/kubernetes/overlays" / overlay))


def test_the_manifests_of_git_are_previewed_for_a_node_with_the_release(estate: Estate) -> None:
    cluster, made = estate.cluster, volume(estate.namespace, "llmkeep-weights", NODE)
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(made))
    try:
        overlay = str(ROOT / "deploy/kubernetes/overlays/cpu")
        lines = estate.deployed(check=True, overlay=overlay, replicas={"llm": 1})["changes"]
    finally:
        cluster.kubectl("delete", "pv", estate.namespace)
    assert "create StatefulSet llmkeep/llm" in lines
    assert "create ValidatingAdmissionPolicy llmkeep-images" in lines
