"""The manifests on real nodes, brought there by role kubernetes: containerd, runc, kubelet, kube-proxy, our image."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from control_plane import kube
from kustomized import IMAGE, containers, kustomized, one
from pod_given import pod_given, tiny_weights
from real_nodes import missing, real_nodes
from serving_nodes import (
    BUDGET,
    BUILT,
    CLIENTS,
    CLUSTER,
    CROWD,
    ENGINE,
    IN,
    PAUSE_IMAGE,
    REPLICAS,
    SECONDS,
    Serving,
    pause_image,
    registry,
    secrets,
    volumes,
)
from waiting import until

from llmkeep.record import pods, runs, witness
from llmproof.heads import stated

pytestmark = pytest.mark.skipif(
    not os.environ.get("STORM"), reason="minutes, so in `make lab-kubernetes` (STORM=1)"
)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two nodes, with what an operator gives, and nothing of ours."""
    kube()
    if lacking := missing():
        pytest.skip(f"a node takes {', '.join(lacking)}: `make lab-kubernetes` installs the packages")
    if not (BUILT / "image.json").exists():
        pytest.skip(f"there is no image in {BUILT}: `make image`")
    folder = tmp_path_factory.mktemp("nodes")
    pause = pause_image(folder / "oci")
    for each in "given", "weights":
        (folder / each).mkdir()
    given, weights = pod_given(folder / "given", (*CLIENTS, *CROWD)), tiny_weights(folder / "weights")
    with (
        real_nodes(folder / "cluster", REPLICAS, pause, {PAUSE_IMAGE: folder / "oci"}) as (cluster, nodes),
        registry(folder, nodes) as images,
    ):
        own = [one(kustomized("overlays/cpu"), "Namespace"), *secrets(given), *volumes(nodes, weights)]
        cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(own))
        yield Serving(cluster, nodes, given, folder, images)


@pytest.fixture
def deployed(serving: Serving) -> Serving:
    """Our replicas, ready."""
    serving.deploy()
    return serving


def test_a_question_is_answered_through_the_service(deployed: Serving) -> None:
    said = deployed.ask(deployed.address())
    assert not said.trouble


def test_the_roles_checks_hold(deployed: Serving) -> None:
    checks = deployed.checks()
    assert len(checks) == 11
    assert [each for each in checks.values() if not each["ok"]] == []


def test_a_second_run_changes_nothing(deployed: Serving) -> None:
    assert " changed=0 " in deployed.deploy()


def test_nodes_pulled_the_image_from_the_mirror(deployed: Serving) -> None:
    events = json.loads(
        deployed.cluster.kubectl("get", "events", IN, "--field-selector=reason=Pulled", "--output=json")
    )
    digest = json.loads((BUILT / "image.json").read_text())["digest"]
    pulled = {
        each["source"]["host"]
        for each in events["items"]
        if f'pulled image "{IMAGE}@{digest}"' in each["message"]
    }
    assert pulled == {node.name for node in deployed.nodes}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("another digest", "not found"),
        ("another authority", "certificate signed by unknown authority"),
        ("a user's certificate", "403 Forbidden"),
    ],
)
def test_a_node_that_cannot_pull_says_why(deployed: Serving, fault: str, said: str) -> None:
    node, images = deployed.nodes[1], deployed.images
    digest = json.loads((BUILT / "image.json").read_text())["digest"]
    match fault:
        case "another digest":
            digest = f"sha256:{'0' * 64}"
        case "another authority":
            images.tell(node, authority=deployed.cluster.keys.ca)
        case "a user's certificate":
            images.tell(node, client="ada")
    try:
        assert said in deployed.not_pulled(node, f"{IMAGE}@{digest}")
    finally:
        images.tell(node)


def test_containers_have_limits_and_no_rights(deployed: Serving) -> None:
    wanted = containers(one(kustomized("overlays/cpu"), "StatefulSet")["spec"]["template"]["spec"])
    groups = deployed.groups(0)
    assert groups.keys() == wanted.keys()
    for name, group in groups.items():
        limit = ENGINE if name == "engine" else wanted[name]["resources"]
        assert (
            int((group / "memory.limit_in_bytes").read_text()) == megabytes(limit["limits"]["memory"]) << 20
        )
        for pid in (group / "cgroup.procs").read_text().split():
            status = Path(f"/proc/{pid}/status").read_text()
            said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert {said[each] for each in ("CapPrm", "CapEff", "CapBnd", "CapInh")} == {"0" * 16}, name
            assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2"), name
            assert int(said["Uid"].split()[0]) == wanted[name]["securityContext"]["runAsUser"]


def test_sidecars_start_in_order_and_the_gateway_last(deployed: Serving) -> None:
    begun = [(each["name"], each["state"]["running"]["startedAt"]) for each in deployed.pod(0)]
    assert [name for name, _ in begun] == ["policy", "opa", "audit", "engine", "edge", "gateway"]
    assert begun == sorted(begun, key=lambda each: each[1])


def test_the_witness_keeps_what_replicas_signed(
    deployed: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the control node asks each minute, by the role's kubeconfig and what the role has on record as applied."""
    (tmp_path / "clusters.json").write_text(
        json.dumps([{"name": CLUSTER["name"], "kubeconfig": str(deployed.cluster.kubeconfig)}])
    )
    (tmp_path / "hosts.yml").write_text(
        "all: {children: {control: {hosts: {ops1: {ansible_connection: local}}}}}"
    )
    monkeypatch.setattr(pods, "APPLIED", deployed.operator.folder / "var/lib/llmkeep/kubernetes")
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    monkeypatch.setattr(witness, "KEPT_OF_PODS", tmp_path / "kept")
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "own")
    kept = [
        witness.Kept(tmp_path / "kept" / f"{CLUSTER['name']}.llm-{replica}") for replica in range(REPLICAS)
    ]

    def looked() -> bool:
        assert witness.collect([str(tmp_path / "hosts.yml")], tmp_path / "clusters.json") == 0
        return all(each.data() for each in kept)

    def recorded() -> bool:
        assert not deployed.ask(deployed.address(), next(clients)).trouble
        files = ([*(node.folder / "record/record").glob("records-*")] for node in deployed.nodes)
        return all(any(file.stat().st_size for file in each) for each in files)

    clients = iter(CLIENTS)
    until(recorded)
    until(looked, 150)  # each replica signs a head a minute
    looked()
    asked = pods.replicas(tmp_path / "clusters.json")
    before = os.times()
    assert len(list(pods.ask(asked, {}, {}))) == REPLICAS
    after = os.times()
    took = sum(after[:4]) - sum(before[:4])
    print(f"{took / REPLICAS:.2f} s of CPU for each replica")
    for replica, each in enumerate(kept):
        record = deployed.nodes[replica].folder / "record"
        assert (each.folder / "verifier").read_text() == (record / "record/verifier").read_text()
        assert (record / "record/heads").read_bytes().startswith(each.data())
        assert stated((record / "seen/head").read_bytes())[1].size > 0


def megabytes(quantity: str) -> int:
    """Of a quantity in Mi or Gi."""
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def test_roll_outs_lose_none_of_ten_thousand_requests(deployed: Serving) -> None:
    with deployed.crowded() as said:
        number = 0
        while len(said) < BUDGET:
            number += 1
            begun = time.monotonic()
            deployed.revision = f"of the crowd, {number}"
            deployed.deploy()
            print("roll-out", number, "took", time.monotonic() - begun, "asked", len(said), flush=True)
    assert [each for each in said if each.trouble] == []


def test_a_killed_pod_loses_only_what_was_in_flight(deployed: Serving) -> None:
    with deployed.asked() as said:
        until(lambda: len(said) > len(CLIENTS))
        pids = [
            int(pid)
            for group in deployed.groups(0).values()
            for pid in (group / "cgroup.procs").read_text().split()
        ]
        for pid in pids:
            with suppress(ProcessLookupError):  # a container's first process takes the others with it
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        killed = time.monotonic()
        until(lambda: not deployed.ready(), 60)
        until(deployed.ready, SECONDS)
    lost = [each for each in said if each.trouble and each.connected]
    assert len(lost) <= len(CLIENTS)
    assert all(each.begun < killed for each in lost)
    print(deployed.verified(0))


def test_a_drained_node_said_goodbye(deployed: Serving) -> None:
    kubectl = deployed.cluster.kubectl
    node = deployed.nodes[1].name  # the other one's record lacks what its killed gateway could not say
    with deployed.asked() as said, ThreadPoolExecutor() as pool:
        until(lambda: len(said) > len(CLIENTS))
        words = pool.submit(kubectl, "logs", "--follow", "--tail=1", "pod/llm-1", IN, "--container=gateway")
        kubectl("drain", node, "--delete-emptydir-data", f"--timeout={SECONDS}s")
        record = deployed.verified(1)
        kubectl("uncordon", node)
        until(deployed.ready, SECONDS)
    assert '"message":"draining"' in words.result()
    # The last answer is on record, and the record's end is signed.
    assert (record["pending"], record["open_tail"]) == (0, 0)
    assert [each for each in said if each.trouble] == []


def test_no_packet_leaves(deployed: Serving) -> None:
    """No pod has begun one in all that was before; one that is told to is heard of, and gets nowhere."""
    assert [node.begun_by_pods() for node in deployed.nodes] == [0] * REPLICAS
    out = "import socket; socket.create_connection(('192.0.2.1', 443), 5)"
    said = deployed.cluster.refused(
        "exec", "pod/llm-0", IN, "--container=gateway", "--", "/usr/bin/python3", "-c", out
    )
    assert "Network is unreachable" in said
    assert deployed.nodes[0].begun_by_pods() > 0
