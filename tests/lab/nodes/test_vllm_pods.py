"""Overlay gpu on real nodes: vLLM's pods answer through the Service, roll out and drain.

vLLM, CUDA's driver, the device plugin and NVIDIA's runtime class are stand-ins; all else is as in test_kubernetes.py.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from control_plane import kube
from kustomized import kustomized, one
from pod_given import MODEL, pod_given, tiny_weights
from real_nodes import missing, real_nodes
from serving_nodes import (
    BUILT,
    CLIENTS,
    ENGINE,
    IN,
    PAUSE_IMAGE,
    REPLICAS,
    SECONDS,
    WORKLOAD,
    Serving,
    pause_image,
    registry,
    secrets,
    volumes,
)
from standin_vllm_image import standin_image
from waiting import until

from lab.instance import CHECKOUT

pytestmark = pytest.mark.skipif(
    not os.environ.get("STORM"), reason="minutes, so in `make lab-kubernetes` (STORM=1)"
)
GPU = "nvidia.com/gpu"
ASKED = {kind: {**amounts, GPU: "1"} for kind, amounts in ENGINE.items()}
# NVIDIA's container toolkit brings a handler of its own, which mounts the driver.
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "nvidia"},
    "handler": "runc",
}


def advertise(serving: Serving, node: str, gpus: int) -> None:
    """In the device plugin's place: the node has so many GPUs."""
    patch = json.dumps({"status": {"capacity": {GPU: str(gpus)}}})
    serving.cluster.kubectl("patch", f"node/{node}", "--subresource=status", f"--patch={patch}")
    allocatable = ["get", f"node/{node}", "--output=jsonpath={.status.allocatable.nvidia\\.com/gpu}"]
    until(lambda: serving.cluster.kubectl(*allocatable) == str(gpus), 60)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two nodes with a GPU each, with what an operator gives, and nothing of ours."""
    kube()
    if lacking := missing():
        pytest.skip(f"a node takes {', '.join(lacking)}: `make lab-kubernetes` installs the packages")
    if not (BUILT / "image.json").exists():
        pytest.skip(f"there is no image in {BUILT}: `make image`")
    folder = tmp_path_factory.mktemp("nodes")
    pause = pause_image(folder / "oci")
    for each in "given", "weights", "image":
        (folder / each).mkdir()
    built = standin_image(BUILT, folder / "image/made", CHECKOUT / ".lab/keys")
    given, weights = pod_given(folder / "given", CLIENTS), tiny_weights(folder / "weights")
    with (
        real_nodes(folder / "cluster", REPLICAS, pause, {PAUSE_IMAGE: folder / "oci"}) as (cluster, nodes),
        registry(folder, nodes, built) as images,
    ):
        own = [one(kustomized("overlays/gpu"), "Namespace")]
        own += [*secrets(given), *volumes(nodes, weights)]
        cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(own))
        yield Serving(cluster, nodes, given, folder, images, built, "gpu", ASKED)


def make_runtime_class(serving: Serving) -> None:
    serving.cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(RUNTIME_CLASS))


@pytest.fixture
def deployed(serving: Serving) -> Serving:
    """Our replicas on nodes that have a GPU each, ready."""
    make_runtime_class(serving)
    for node in serving.nodes:
        advertise(serving, node.name, 1)
    serving.deploy()
    return serving


def refused(serving: Serving) -> str:
    """Why a run is refused that leaves the cluster as it is."""
    before = serving.cluster.kubectl("get", "statefulsets,configmaps,services", IN, "--output=name")
    with pytest.raises(AssertionError) as problem:
        serving.deploy()
    assert serving.cluster.kubectl("get", "statefulsets,configmaps,services", IN, "--output=name") == before
    return str(problem.value)


def test_a_cluster_without_nvidias_runtime_is_refused_before_anything_changes(serving: Serving) -> None:
    assert "has the runtime class nvidia, and the cluster has none" in refused(serving)


def test_nodes_without_gpus_are_refused_before_anything_changes(serving: Serving) -> None:
    make_runtime_class(serving)
    said = refused(serving)
    assert f"asks for 1 {GPU} a pod, and no node has more than 0 allocatable" in said


def test_one_gpu_for_two_replicas_is_refused_before_anything_changes(serving: Serving) -> None:
    advertise(serving, serving.nodes[0].name, 1)
    assert f"2 {GPU} are declared, and the nodes have 1 allocatable" in refused(serving)


def test_a_node_without_the_release_is_refused_before_anything_changes(serving: Serving) -> None:
    for node in serving.nodes:
        advertise(serving, node.name, 1)
    other = f"node/{serving.nodes[1].name}"
    serving.cluster.kubectl("label", other, "llmkeep.org/serving-")
    try:
        assert "has 2 replicas, and 1 volumes with the verified release" in refused(serving)
    finally:
        serving.cluster.kubectl("label", other, "llmkeep.org/serving=true")


def engine_log(serving: Serving, replica: int) -> str:
    """What the engine of a replica printed."""
    done = serving.cluster.attempted("logs", f"pod/llm-{replica}", IN, "--container=engine", "--tail=-1")
    return done.stdout + done.stderr


def test_a_question_is_answered_through_the_service(deployed: Serving) -> None:
    assert not deployed.ask(deployed.address()).trouble
    assert ["STAND-IN: this is not vLLM" in engine_log(deployed, replica) for replica in range(REPLICAS)] == [
        True
    ] * REPLICAS


def test_the_roles_checks_hold_and_a_second_run_changes_nothing(deployed: Serving) -> None:
    assert [each for each in deployed.checks().values() if not each["ok"]] == []
    assert " changed=0 " in deployed.deploy()


def test_each_engine_has_shared_memory_of_its_size_and_a_gpu(deployed: Serving) -> None:
    for replica in range(REPLICAS):
        (engine,) = (each for each in deployed.pod(replica) if each["name"] == "engine")
        assert engine["resources"]["limits"][GPU] == "1"
        sizes = [
            "exec",
            f"pod/llm-{replica}",
            IN,
            "--container=engine",
            "--",
            "/usr/bin/df",
            "--output=fstype,size",
        ]
        kind, kilobytes = deployed.cluster.kubectl(*sizes, "/dev/shm").splitlines()[1].split()
        assert (kind, 1 << 20 < int(kilobytes) <= 8 << 20) == ("tmpfs", True)  # runc's own has 64 MiB


def test_a_roll_out_loses_no_request(deployed: Serving) -> None:
    with deployed.asked() as said:
        until(lambda: len(said) > len(CLIENTS))
        deployed.revision = "the next"
        deployed.deploy()
    assert [each for each in said if each.trouble] == []


def test_a_drained_node_loses_no_request_and_its_record_ends_signed(deployed: Serving) -> None:
    kubectl, node = deployed.cluster.kubectl, deployed.nodes[1].name
    with deployed.asked() as said:
        until(lambda: len(said) > len(CLIENTS))
        kubectl("drain", node, "--delete-emptydir-data", f"--timeout={SECONDS}s")
        record = deployed.verified(1)
        kubectl("uncordon", node)
        until(deployed.ready, SECONDS)
    assert (record["pending"], record["open_tail"]) == (0, 0)
    assert [each for each in said if each.trouble] == []


def test_a_pod_whose_weights_went_says_so_and_the_other_one_answers(deployed: Serving) -> None:
    weights = deployed.folder / "weights" / MODEL
    aside = weights.rename(Path(f"{weights}.aside"))
    try:
        deployed.cluster.kubectl("delete", "pod/llm-1", IN)
        until(lambda: "cannot read the manifest" in engine_log(deployed, 1), SECONDS)
        assert not deployed.ask(deployed.address()).trouble
    finally:
        aside.rename(weights)
    deployed.cluster.kubectl("delete", "pod/llm-1", IN)
    ready = ["rollout", "status", WORKLOAD, IN, f"--timeout={SECONDS}s"]
    deployed.cluster.kubectl(*ready)
