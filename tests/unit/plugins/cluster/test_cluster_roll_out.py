"""Module cluster_manifests by Debian's kubectl: what a run brings to a real control plane with a hollow node, and takes back."""

import pytest
from cluster_overlay import DIGESTS, IMAGE, signed_image
from deployed_cluster import NODE, NOWHERE, Estate, stateful
from plugin_modules import load


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
    assert "There was no earlier revision" in estate.refused(seconds=2)
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
    assert "there is none to roll back to" in said


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


def test_a_new_digest_is_rolled_out(estate: Estate) -> None:
    estate.deployed()
    signed_image(estate.folder, estate.keys, digest=DIGESTS[1])
    assert estate.deployed()["changes"] == [f"change Deployment {estate.namespace}/serving"]
    assert estate.seen("deployment", "{..image}") == f"{IMAGE}@{DIGESTS[1]}"


def test_an_older_image_is_deployed_for_a_reason_and_counts_from_then_on(estate: Estate) -> None:
    for serial, digest in ((41, DIGESTS[0]), (40, DIGESTS[1])):
        signed_image(estate.folder, estate.keys, serial=serial, digest=digest)
        if serial == 41:
            estate.deployed()
    assert "has serial 40, and 41 was deployed from here" in estate.refused()
    estate.deployed(allow_older="41 answers slowly", check=True)
    assert "has serial 40, and 41 was deployed from here" in estate.refused()
    estate.deployed(allow_older="41 answers slowly")
    assert estate.seen("deployment", "{..image}") == f"{IMAGE}@{DIGESTS[1]}"
    assert estate.deployed()["changes"] == []
    signed_image(estate.folder, estate.keys, serial=39)
    assert "has serial 39, and 40 was deployed from here" in estate.refused()


def test_a_stateful_roll_out_that_fails_is_taken_back(estate: Estate) -> None:
    """Its controller waits for ever for a pod that does not become ready."""
    spec = stateful(estate)["spec"]["template"]["spec"]
    estate.deployed()
    spec["nodeSelector"] = NOWHERE
    assert estate.refused(seconds=10).endswith("The revision before was applied again and is healthy.")
    assert estate.seen("statefulset", "{.status.readyReplicas}") == "1"
