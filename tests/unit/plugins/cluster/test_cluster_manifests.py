"""Module cluster_manifests against a real control plane and a hollow node, by Debian's kubectl."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from cluster_overlay import DIGESTS, IMAGE, Manifest, manifests, signed_image, write
from control_plane import ControlPlane
from plugin_modules import ROOT, load

module = load("modules.cluster_manifests")
capacity = load("module_utils.cluster.capacity")
NODE = "hollow-0"
NOWHERE = {"kubernetes.io/hostname": "nowhere"}


@dataclass
class Estate:
    """What a control node has for one cluster, in a namespace of its own there."""

    cluster: ControlPlane
    folder: Path
    keys: Path
    capsys: pytest.CaptureFixture[str]
    namespace: str
    objects: dict[str, Manifest] = field(default_factory=dict)
    kubeconfig: Path | None = None

    @property
    def pod(self) -> Any:
        """The pod template's specification."""
        return self.objects["Deployment"]["spec"]["template"]["spec"]

    def run(self, check: bool = False, seconds: int = 60, **given: object) -> dict[str, Any]:
        """What the module says."""
        known = {
            "kubeconfig": str(self.kubeconfig or self.cluster.kubeconfig),
            "overlay": str(write(self.folder / "overlay", self.objects)),
            "image": str(self.folder / "image.json"),
            "keyring": str(self.keys / "keyring.pgp"),
            "registry": "registry.llmkeep.internal",
            "record": str(self.folder / "record"),
            "seconds": seconds,
        }
        return called(module, {**known, **given, "_ansible_check_mode": check}, self.capsys)

    def deployed(self, **given: object) -> dict[str, Any]:
        """What a run says that has to succeed."""
        said = self.run(**given)  # type: ignore[arg-type]
        assert "failed" not in said, said["msg"]
        return said

    def refused(self, **given: object) -> str:
        """Why a run is refused."""
        said = self.run(**given)  # type: ignore[arg-type]
        assert said.get("failed"), said
        return str(said["msg"])

    def seen(self, kind: str, path: str) -> str:
        """A field of the cluster's object of this kind."""
        return self.cluster.kubectl("get", kind, "serving", "-n", self.namespace, f"--output=jsonpath={path}")

    def names(self, kind: str) -> list[str]:
        """Names of all objects of this kind in the namespace."""
        return self.cluster.kubectl("get", kind, "-n", self.namespace, "--output=name").split()

    def untouched(self) -> bool:
        """Whether the cluster has nothing of the namespace."""
        return f"namespace/{self.namespace}" not in self.cluster.kubectl("get", "namespaces", "-o", "name")


@pytest.fixture
def estate(
    cluster: ControlPlane,
    keys: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Iterator[Estate]:
    namespace = f"llm-{abs(hash(request.node.name))}"
    signed_image(tmp_path, keys)
    made = Estate(cluster, tmp_path, keys, capsys, namespace, manifests(namespace))
    yield made
    cluster.kubectl("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")


def test_a_first_run_makes_everything_and_a_second_one_changes_nothing(estate: Estate) -> None:
    assert estate.deployed()["changes"] == [
        f"create Namespace {estate.namespace}",
        f"create Deployment {estate.namespace}/serving",
        f"create PodDisruptionBudget {estate.namespace}/serving",
    ]
    assert estate.seen("deployment", "{.status.readyReplicas}") == "1"
    assert estate.seen("deployment", "{..image}") == f"{IMAGE}@{DIGESTS[0]}"
    again = estate.deployed()
    assert not again["changed"], again["changes"]


def test_check_mode_says_what_a_run_would_make_and_makes_nothing(estate: Estate) -> None:
    said = estate.deployed(check=True)
    assert [line.split()[1] for line in said["changes"]] == [*estate.objects]
    assert estate.untouched()
    assert not (estate.folder / "record").exists()


def test_check_mode_shows_drift_and_a_run_mends_it(estate: Estate) -> None:
    estate.deployed()
    estate.cluster.kubectl("delete", "pdb", "serving", "-n", estate.namespace)
    said = estate.deployed(check=True)
    assert said["changes"] == [f"create PodDisruptionBudget {estate.namespace}/serving"]
    assert "minAvailable: 1" in said["diff"][0]["after"]
    assert estate.names("pdb") == []
    assert estate.deployed()["changed"]
    assert len(estate.names("pdb")) == 1


def test_a_number_of_replicas_of_the_inventory_counts(estate: Estate) -> None:
    estate.deployed(replicas={"serving": 3})
    assert estate.seen("deployment", "{.status.readyReplicas}") == "3"


def test_what_is_declared_no_more_is_removed_and_what_others_made_stays(estate: Estate) -> None:
    estate.deployed()
    estate.cluster.kubectl("create", "configmap", "other", "-n", estate.namespace)
    del estate.objects["PodDisruptionBudget"]
    assert estate.deployed(check=True)["changes"] == [
        f"remove PodDisruptionBudget {estate.namespace}/serving"
    ]
    assert len(estate.names("pdb")) == 1
    estate.deployed()
    assert estate.names("pdb") == []
    assert "configmap/other" in estate.names("configmap")


def test_a_claim_that_is_declared_no_more_stays(estate: Estate) -> None:
    estate.objects["PersistentVolumeClaim"] = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "serving", "namespace": estate.namespace},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    estate.deployed()
    del estate.objects["PersistentVolumeClaim"]
    assert not estate.deployed()["changed"]
    assert estate.names("pvc") == ["persistentvolumeclaim/serving"]


def test_a_roll_out_that_fails_is_taken_back_with_the_pods_reason(estate: Estate) -> None:
    estate.deployed()
    estate.pod["nodeSelector"] = NOWHERE
    estate.objects["ConfigMap"] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "serving", "namespace": estate.namespace},
    }
    said = estate.refused(seconds=2)
    assert "didn't match Pod's node affinity/selector" in said
    assert said.endswith("The revision before was applied again and is healthy.")
    assert estate.seen("deployment", "{..nodeSelector}") == ""
    assert "configmap/serving" not in estate.names("configmap")


def test_a_first_roll_out_that_fails_leaves_nothing_but_its_namespace(estate: Estate) -> None:
    estate.pod["nodeSelector"] = NOWHERE
    assert "There was none before" in estate.refused(seconds=2)
    assert estate.names("deployment") == estate.names("pdb") == []


def test_a_revision_that_became_unhealthy_is_said_and_not_taken_back(estate: Estate) -> None:
    estate.deployed()
    estate.cluster.kubectl("cordon", NODE)
    try:
        estate.cluster.kubectl("delete", "pod", "--all", "-n", estate.namespace)
        said = estate.refused(seconds=2)
    finally:
        estate.cluster.kubectl("uncordon", NODE)
    assert "1 node(s) were unschedulable" in said
    assert "there is none to go back to" in said


def cut_short(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed when it has applied a ConfigMap more, which is declared no more afterwards."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    estate.objects["ConfigMap"] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "serving", "namespace": estate.namespace},
    }
    with monkeypatch.context() as cut:
        cut.setattr(load("module_utils.cluster.rollout"), "unhealthy", killed)
        with pytest.raises(KeyboardInterrupt):
            estate.run()
    assert "configmap/serving" in estate.names("configmap")
    del estate.objects["ConfigMap"]


def test_a_run_that_was_cut_short_is_finished_by_the_next_one(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate.deployed()
    cut_short(estate, monkeypatch)
    assert estate.deployed()["changes"] == [f"remove ConfigMap {estate.namespace}/serving"]
    assert "configmap/serving" not in estate.names("configmap")


def test_a_run_that_was_cut_short_is_taken_back_with_the_next_one_that_fails(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate.deployed()
    cut_short(estate, monkeypatch)
    estate.pod["nodeSelector"] = NOWHERE
    estate.refused(seconds=2)
    assert "configmap/serving" not in estate.names("configmap")


def test_a_field_of_another_manager_is_left_to_it_by_name(estate: Estate) -> None:
    estate.deployed()
    estate.cluster.kubectl("scale", "deployment/serving", "--replicas=2", "-n", estate.namespace)
    for check in (True, False):
        said = estate.run(check=check)
        assert 'conflict with "kubectl"' in said["msg"]
        assert ".spec.replicas" in said["msg"]
    shown = estate.run(check=True)["diff"][0]
    assert ("replicas: 2" in shown["before"], "replicas: 1" in shown["after"]) == (True, True)
    assert estate.seen("deployment", "{.spec.replicas}") == "2"


def test_an_object_that_others_made_is_not_taken_over(estate: Estate) -> None:
    estate.cluster.kubectl("create", "namespace", estate.namespace)
    estate.cluster.kubectl("create", "deployment", "serving", "--image=x", "-n", estate.namespace)
    assert (
        "llmkeep did not make it (its managers: kube-controller-manager, kubectl-create)" in estate.refused()
    )
    assert estate.names("pdb") == []


# ---------------------------------------------------------------- the kubeconfig
def altered(estate: Estate, alter: Callable[[Any], object]) -> Path:
    content = json.loads(estate.cluster.kubeconfig.read_text())
    alter(content)
    estate.kubeconfig = estate.folder / "kubeconfig"
    estate.kubeconfig.touch(0o600)
    estate.kubeconfig.write_text(json.dumps(content))
    return estate.kubeconfig


def test_a_kubeconfig_that_others_read_is_refused(estate: Estate) -> None:
    altered(estate, lambda _: None).chmod(0o640)
    assert "has mode 0640 of uid 0, and is for root alone" in estate.refused()


def test_a_kubeconfig_of_another_user_is_refused(estate: Estate) -> None:
    os.chown(altered(estate, lambda _: None), 65534, 65534)
    assert "has mode 0600 of uid 65534, and is for root alone" in estate.refused()


def test_a_kubeconfig_in_a_folder_that_others_change_is_refused(estate: Estate) -> None:
    path = altered(estate, lambda _: None)
    (estate.folder / "open").mkdir()
    estate.kubeconfig = path.rename(estate.folder / "open" / "kubeconfig")
    (estate.folder / "open").chmod(0o777)
    assert "cannot be read" in estate.refused()


def test_a_kubeconfig_that_verifies_no_server_is_refused(estate: Estate) -> None:
    altered(
        estate, lambda content: content["clusters"][0]["cluster"].update({"insecure-skip-tls-verify": True})
    )
    assert "insecure-skip-tls-verify" in estate.refused()


def test_a_kubeconfig_without_tls_is_refused(estate: Estate) -> None:
    altered(
        estate, lambda content: content["clusters"][0]["cluster"].update({"server": "http://127.0.0.1:1"})
    )
    assert "not reached by TLS" in estate.refused()


def test_a_file_that_is_no_kubeconfig_is_refused_without_its_content(estate: Estate) -> None:
    altered(estate, lambda content: content.update({"current-context": "secret"}))
    said = estate.refused()
    assert "is no kubeconfig with a current context" in said
    assert "secret" not in said


def test_a_kubeconfig_of_another_authority_is_refused(estate: Estate) -> None:
    altered(
        estate,
        lambda content: content["clusters"][0]["cluster"].pop("certificate-authority-data"),
    )
    assert "not one of the kubeconfig's authority" in estate.refused()


def test_a_cluster_out_of_reach_is_refused(estate: Estate) -> None:
    altered(
        estate, lambda content: content["clusters"][0]["cluster"].update({"server": "https://127.0.0.1:1"})
    )
    assert "base_open_out" in estate.refused()


def test_a_user_without_rights_is_told_which_are_missing(estate: Estate) -> None:
    estate.kubeconfig = estate.cluster.identity("visitor", ["visitors"])
    said = estate.refused()
    assert f"patch deployments.apps in {estate.namespace}" in said
    assert "secrets" not in said
    assert estate.untouched()


# ---------------------------------------------------------------- the image
def test_an_image_record_that_was_changed_is_refused(estate: Estate) -> None:
    record = estate.folder / "image.json"
    record.write_text(record.read_text().replace(DIGESTS[0], DIGESTS[1]))
    assert "has no valid signature" in estate.refused()
    assert estate.untouched()


def test_another_digest_than_the_signed_one_is_refused(estate: Estate) -> None:
    estate.pod["containers"][0]["image"] = f"registry.example.org/llmkeep@{DIGESTS[1]}"
    assert f"the signed record names {IMAGE}@{DIGESTS[0]}" in estate.refused()
    assert estate.untouched()


def test_a_new_digest_is_rolled_out(estate: Estate) -> None:
    estate.deployed()
    signed_image(estate.folder, estate.keys, DIGESTS[1])
    assert estate.deployed()["changes"] == [f"change Deployment {estate.namespace}/serving"]
    assert estate.seen("deployment", "{..image}") == f"{IMAGE}@{DIGESTS[1]}"


def test_a_secret_in_a_manifest_is_refused(estate: Estate) -> None:
    estate.objects["Secret"] = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "serving", "namespace": estate.namespace},
        "stringData": {"key": "value-of-the-secret"},
    }
    said = estate.refused()
    assert "is declared in a manifest" in said
    assert "value-of-the-secret" not in said


def test_an_overlay_that_others_change_is_refused(estate: Estate) -> None:
    (estate.folder / "overlay").mkdir()
    (estate.folder / "overlay").chmod(0o777)
    assert "others than root can change what is in it" in estate.refused()


# ---------------------------------------------------------------- the cluster
def test_an_object_without_a_namespace_is_refused(estate: Estate) -> None:
    estate.objects["PodDisruptionBudget"]["metadata"] = {"name": "serving"}
    assert "PodDisruptionBudget serving has no namespace" in estate.refused()
    assert estate.untouched()


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


def stateful(estate: Estate) -> Manifest:
    """The workload, made a StatefulSet."""
    workload = estate.objects.pop("Deployment")
    workload["kind"] = "StatefulSet"
    workload["spec"]["serviceName"] = "serving"
    estate.objects["StatefulSet"] = workload
    return workload


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


def test_a_stateful_roll_out_that_fails_is_taken_back(estate: Estate) -> None:
    """Its controller waits for ever for a pod that does not become ready."""
    spec = stateful(estate)["spec"]["template"]["spec"]
    estate.deployed()
    spec["nodeSelector"] = NOWHERE
    assert estate.refused(seconds=10).endswith("The revision before was applied again and is healthy.")
    assert estate.seen("statefulset", "{.status.readyReplicas}") == "1"


def test_a_webhook_that_is_down_is_named_and_nothing_is_left(estate: Estate) -> None:
    hook = {
        "name": "guard.example.org",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [
            {"apiGroups": ["policy"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["*"]}
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": estate.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    configuration = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": estate.namespace},
        "webhooks": [hook],
    }
    estate.cluster.kubectl("create", "-f", "-", stdin=json.dumps(configuration))
    try:
        assert 'failed calling webhook "guard.example.org"' in estate.refused()
    finally:
        estate.cluster.kubectl("delete", "validatingwebhookconfiguration", estate.namespace)
    assert estate.untouched()
