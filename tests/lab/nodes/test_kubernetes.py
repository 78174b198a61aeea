"""The manifests on real nodes, brought there by role kubernetes' module: containerd, runc, kubelet, kube-proxy, our image."""

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from called_module import called
from control_plane import ControlPlane, kube
from kustomized import IMAGE, Manifest, containers, kustomized, one
from namespaces import inside
from plugin_modules import ROOT, load
from pod_given import MODEL, Given, pod_given, tiny_weights
from pod_here import SERVING
from real_nodes import Node, missing, real_nodes
from waiting import until

from llmkeep.image.layout import INDEX, REFERENCE, Layout, encoded
from llmkeep.record import pods, runs, witness
from llmproof.heads import stated

pytestmark = pytest.mark.skipif(
    not os.environ.get("STORM"), reason="minutes, so in `make lab-kubernetes` (STORM=1)"
)
REPLICAS = 2
SECONDS = 400
# Each client has an identity of its own, and stays below 15 requests a minute, which is what a gateway that counts alone gives.
CLIENTS = tuple(f"client-{number}" for number in range(16))
WORDS, PAUSE = 200, 4.5
IN = "--namespace=llmkeep"
WORKLOAD = "statefulset/llm"
BUILT = Path(os.environ.get("LLMKEEP_IMAGE", ROOT / ".lab/image"))  # by `make image`
# What a small machine cannot reserve: of the engine's two processors.
ENGINE = {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


def with_pause(folder: Path) -> tuple[Path, str]:
    """A layout with our image and one more of its layers, which does nothing: a pod's first container. And its name."""
    shutil.copytree(BUILT / "oci", folder, copy_function=os.symlink)
    layout = Layout(folder)
    ours = layout.index()[0]
    manifest = layout.read(ours["digest"])
    config = layout.read(manifest["config"]["digest"])
    config["config"]["Cmd"] = ["/usr/bin/sleep", "infinity"]
    pause = layout.add_image(manifest["layers"], config)
    images = [ours, {**ours, **pause, "annotations": {REFERENCE: "pause"}}]
    (folder / "index.json").unlink()
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": images}
    (folder / "index.json").write_bytes(encoded(index))
    return folder, f"{IMAGE}@{pause['digest']}"


def volumes(nodes: list[Node], weights: Path) -> Iterator[Manifest]:
    """Those of each node, for the replica that is to be there."""
    for number, node in enumerate(nodes):
        for claim, mode, storage in (
            ("weights", "ReadOnlyMany", "llmkeep-weights"),
            ("record", "ReadWriteOncePod", ""),
            ("state", "ReadWriteOncePod", ""),
        ):
            path = weights if claim == "weights" else node.folder / claim
            path.mkdir(exist_ok=True, parents=True)
            here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name]}
            yield {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{claim}-{number}"},
                "spec": {
                    "accessModes": [mode],
                    "capacity": {"storage": "10Gi"},
                    "local": {"path": str(path)},
                    "mountOptions": ["ro"] if claim == "weights" else [],
                    "storageClassName": storage,
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
                    "claimRef": {"namespace": "llmkeep", "name": f"{claim}-llm-{number}"},
                },
            }


def secrets(given: Given) -> Iterator[Manifest]:
    """What an operator makes in the namespace."""
    for name, content in given.items():
        kind, field = ("ConfigMap", "binaryData") if name == "llm-policy" else ("Secret", "data")
        data = {key: base64.b64encode(each).decode() for key, each in content.items()}
        yield {
            "apiVersion": "v1",
            "kind": kind,
            "metadata": {"name": name, "namespace": "llmkeep"},
            field: data,
        }


@dataclass(frozen=True)
class Said:
    """What became of one request: its times, and why there was no answer; CONNECTED: whether a replica had taken it."""

    begun: float
    ended: float
    trouble: str
    connected: bool


class Serving:
    """The cluster with our replicas."""

    def __init__(self, cluster: ControlPlane, nodes: list[Node], given: Given, folder: Path) -> None:
        self.cluster, self.nodes, self.given, self.folder = cluster, nodes, given, folder
        self.overlay = folder / "overlay"
        self.revision = "first"

    def declare(self) -> None:
        """Write the overlay: `cpu`, with what a small machine can reserve, and the revision at its pods."""
        self.overlay.mkdir(exist_ok=True)
        patch = [
            {"op": "test", "path": "/spec/template/spec/initContainers/3/name", "value": "engine"},
            {"op": "replace", "path": "/spec/template/spec/initContainers/3/resources", "value": ENGINE},
            {
                "op": "add",
                "path": "/spec/template/metadata/annotations",
                "value": {"revision": self.revision},
            },
        ]
        content = {
            "resources": [os.path.relpath(ROOT / "deploy/kubernetes/overlays/cpu", self.overlay.resolve())],
            "patches": [{"target": {"kind": "StatefulSet"}, "patch": json.dumps(patch)}],
        }
        (self.overlay / "kustomization.yaml").write_text(json.dumps(content))

    def deploy(self, capsys: pytest.CaptureFixture[str]) -> None:
        """As role kubernetes does, until all replicas are ready."""
        self.declare()
        given = {
            "kubeconfig": str(self.cluster.kubeconfig),
            "overlay": str(self.overlay),
            "image": str(BUILT / "image.json"),
            "keyring": str(ROOT / ".lab/keys/keyring.pgp"),
            "registry": IMAGE.partition("/")[0],
            "replicas": {"llm": REPLICAS},
            "record": str(self.folder / "record"),
            "seconds": SECONDS,
        }
        said = called(load("modules.cluster_manifests"), given, capsys)
        assert "failed" not in said, said["msg"]

    def ready(self) -> bool:
        """Whether all replicas are."""
        seen = self.cluster.kubectl("get", WORKLOAD, IN, "--output=jsonpath={.status.readyReplicas}")
        return seen == str(REPLICAS)

    def address(self) -> str:
        """The Service's."""
        return self.cluster.kubectl("get", "service/llm", IN, "--output=jsonpath={.spec.clusterIP}")

    def ask(self, address: str, client: str = CLIENTS[0]) -> Said:
        """Ask by a connection of its own."""
        context = ssl.create_default_context(cadata=self.given["test"]["ca.crt"].decode())
        question = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        body = json.dumps({**question, "max_tokens": WORDS, "temperature": 0})
        key = self.given["test"][client].decode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        begun, connected, trouble = time.monotonic(), False, ""
        try:
            with socket.create_connection((address, 443), 5) as plain:
                connected = True
                plain.settimeout(60)
                link = http.client.HTTPSConnection(address)
                link.sock = context.wrap_socket(plain, server_hostname="localhost")
                link.request("POST", "/v1/chat/completions", body, headers)
                answer = link.getresponse()
                content = answer.read().decode()
                trouble = "" if answer.status == 200 else f"{answer.status} {content}"
        except (OSError, http.client.HTTPException) as problem:
            trouble = repr(problem)
        return Said(begun, time.monotonic(), trouble, connected)

    @contextmanager
    def asked(self) -> Iterator[list[Said]]:
        """Clients that ask one question after the other, within the block; what became of each."""
        address, end = self.address(), Event()
        said: list[Said] = []
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

        def work(client: str) -> None:
            with inside(network):
                while not end.is_set():
                    said.append(self.ask(address, client))
                    end.wait(PAUSE)

        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            clients = [pool.submit(work, each) for each in CLIENTS]
            try:
                yield said
            finally:
                end.set()
        os.close(network)
        for each in clients:
            each.result()
        took = sorted(each.ended - each.begun for each in said)
        print(len(said), "asked, in the middle", took[len(took) // 2], "s, at most", took[-1])
        print(*(each for each in said if each.trouble), sep="\n")

    def pod(self, replica: int) -> list[Manifest]:
        """What kubelet says of a pod's containers, in the manifest's order."""
        status = json.loads(self.cluster.kubectl("get", f"pod/llm-{replica}", IN, "--output=json"))["status"]
        return [*status["initContainerStatuses"], *status["containerStatuses"]]

    def groups(self, replica: int) -> dict[str, Path]:
        """The control group of memory of each of a pod's containers."""
        ids = {each["containerID"].rpartition("/")[2]: each["name"] for each in self.pod(replica)}
        whole = Path(self.nodes[replica].groups["memory"])
        return {ids[path.name]: path for path in whole.rglob("*") if path.name in ids}

    def verified(self, replica: int) -> dict[str, Any]:
        """What the verifier says of a replica's record; AssertionError if it is not whole."""
        argv = [
            str(SERVING / "llm-audit"),
            "verify",
            "--live",
            "--json",
            str(self.nodes[replica].folder / "record/record"),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two nodes, with what an operator gives, and nothing of ours."""
    kube()
    if lacking := missing():
        pytest.skip(f"a node takes {', '.join(lacking)}: `make lab-kubernetes` installs the packages")
    if not (BUILT / "image.json").exists():
        pytest.skip(f"there is no image in {BUILT}: `make image`")
    folder = tmp_path_factory.mktemp("nodes")
    layout, pause = with_pause(folder / "oci")
    for each in "given", "weights":
        (folder / each).mkdir()
    given, weights = pod_given(folder / "given", CLIENTS), tiny_weights(folder / "weights")
    with real_nodes(folder / "cluster", REPLICAS, pause, {IMAGE: layout}) as (cluster, nodes):
        own = [one(kustomized("overlays/cpu"), "Namespace"), *secrets(given), *volumes(nodes, weights)]
        cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(own))
        yield Serving(cluster, nodes, given, folder)


@pytest.fixture
def deployed(serving: Serving, capsys: pytest.CaptureFixture[str]) -> Serving:
    """Our replicas, ready."""
    serving.deploy(capsys)
    return serving


def test_a_question_is_answered_through_the_service(deployed: Serving) -> None:
    said = deployed.ask(deployed.address())
    assert not said.trouble


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
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters/lab").symlink_to(deployed.folder / "record")
    (tmp_path / "clusters.json").write_text(
        json.dumps([{"name": "lab", "kubeconfig": str(deployed.cluster.kubeconfig)}])
    )
    (tmp_path / "hosts.yml").write_text(
        "all: {children: {control: {hosts: {ops1: {ansible_connection: local}}}}}"
    )
    monkeypatch.setattr(pods, "APPLIED", tmp_path / "clusters")
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    monkeypatch.setattr(witness, "KEPT_OF_PODS", tmp_path / "kept")
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "own")
    kept = [witness.Kept(tmp_path / "kept" / f"lab.llm-{replica}") for replica in range(REPLICAS)]

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


def test_a_roll_out_under_load_loses_no_request(
    deployed: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    with deployed.asked() as said:
        until(lambda: len(said) > len(CLIENTS))
        deployed.revision = "second"
        deployed.deploy(capsys)
    assert [each for each in said if each.trouble] == []


def test_a_killed_pod_loses_only_what_was_in_flight(deployed: Serving) -> None:
    with deployed.asked() as said:
        until(lambda: len(said) > len(CLIENTS))
        for group in deployed.groups(0).values():
            for pid in (group / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):  # a container's first process takes the others with it
                    os.kill(int(pid), signal.SIGKILL)
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
