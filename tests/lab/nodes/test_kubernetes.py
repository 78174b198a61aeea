"""The manifests on real nodes, brought there by role kubernetes' module: containerd, runc, kubelet, kube-proxy, our image."""

import base64
import http.client
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import Any

import pytest
import yaml
from control_node import ControlNode
from control_plane import ControlPlane, kube
from kustomized import IMAGE, Manifest, containers, kustomized, one
from mirror_here import authority, certify, configured, mirror
from namespaces import inside
from plugin_modules import ROOT
from pod_given import MODEL, Given, pod_given, tiny_weights
from pod_here import SERVING
from real_nodes import MASTER, Node, missing, real_nodes
from waiting import until

from llmkeep.image import archive, served
from llmkeep.image.layout import INDEX, REFERENCE, Layout, encoded
from llmkeep.places import Places
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
# Those that ask until so many questions were asked, each of them every so many seconds.
CROWD = tuple(f"crowd-{number}" for number in range(120))
BUDGET, EVERY, FEW_WORDS = 10_000, 5, 1
# So many at a time, since a gateway lets 42 requests of one tenant wait for an engine: a slow machine takes longer.
AT_A_TIME = 40
PAUSE_IMAGE = f"{IMAGE.partition('/')[0]}/pause"
IN = "--namespace=llmkeep"
OVERLAY = "/etc/llmkeep/kubernetes/main"
CLUSTER = {"name": "main", "kubeconfig": f"{OVERLAY}.kubeconfig", "overlay": OVERLAY}
WORKLOAD = "statefulset/llm"
BUILT = Path(os.environ.get("LLMKEEP_IMAGE", ROOT / ".lab/image"))  # by `make image`
# What a small machine cannot reserve: of the engine's two processors.
ENGINE = {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


def pause_image(folder: Path) -> str:
    """A layout with an image of which a pod's first container is, which does nothing; its name."""
    (folder / "root").mkdir(parents=True)
    (folder / "pause.c").write_text("#include <unistd.h>\nint main(void) { for (;;) pause(); }\n")
    subprocess.run(["gcc-14", "-static", "-o", folder / "root/pause", folder / "pause.c"], check=True)
    layer = archive.write("pause", folder / "root", folder / "pause.gz", 0)
    layout = Layout(folder)
    layout.begin()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        "config": {"Cmd": ["/pause"]},
    }
    image = layout.add_image([layout.add_layer(layer, folder / "pause.gz")], config)
    image["annotations"] = {REFERENCE: "pause"}
    (folder / "index.json").write_bytes(
        encoded({"schemaVersion": 2, "mediaType": INDEX, "manifests": [image]})
    )
    return f"{PAUSE_IMAGE}@{image['digest']}"


@dataclass(frozen=True)
class Registry:
    """The mirror of an estate whose hosts the nodes are: its image is ours. PLACES: of the estate's authority."""

    places: Places

    def tell(self, node: Node, authority: Path | None = None, client: str = "") -> None:
        """Write a node's hosts.toml as documented, with this authority's certificate and the one of this client."""
        folder = node.folder / "certs.d" / IMAGE.partition("/")[0]
        folder.mkdir(parents=True, exist_ok=True)
        host = self.places.root / (client or node.name)
        (text,) = (
            each for each in (ROOT / "docs/image.md").read_text().split("```") if "capabilities =" in each
        )
        for there, here in {
            "ops1.estate.internal": MASTER,
            "/etc/llmkeep/pki/root.pem": str(authority or self.places.root_certificate),
            "/etc/llmkeep/pki/host.pem": f"{host}.pem",
            "/etc/llmkeep/pki/host.key": f"{host}.key",
        }.items():
            assert there in text
            text = text.replace(there, here)
        (folder / "hosts.toml").write_text(text)


@contextmanager
def registry(folder: Path, nodes: list[Node]) -> Iterator[Registry]:
    """It runs where the control plane does."""
    hosts = {f"{each.name}.estate.internal": each.address for each in nodes}
    with authority(folder / "control") as places:
        for each in nodes:
            certify(places, each.name, f"{each.name}.estate.internal")
        certify(places, "ada", "ada.estate.internal")
        (folder / "mirror").mkdir()
        served.add(Places(folder / "mirror"), BUILT, ROOT / ".lab/keys/keyring.pgp")
        made = configured(folder / "mirror", {"ops1.estate.internal": MASTER, **hosts}, 8443)
        with mirror(made, places, MASTER):
            found = Registry(places)
            for each in nodes:
                found.tell(each)
            yield found


def _closed(link: http.client.HTTPSConnection) -> bool:
    """Whether the server has closed it: there is something to read before anything was asked."""
    return link.sock is None or bool(select.select([link.sock], [], [], 0)[0])


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

    def __init__(
        self, cluster: ControlPlane, nodes: list[Node], given: Given, folder: Path, images: Registry
    ) -> None:
        self.cluster, self.nodes, self.given, self.folder, self.images = cluster, nodes, given, folder, images
        clusters = [{**CLUSTER, "replicas": {"llm": REPLICAS}, "seconds": SECONDS}]
        self.operator = ControlNode(folder / "ops1", {"kubernetes_clusters": clusters})
        self.operator.bring(CLUSTER["kubeconfig"], cluster.kubeconfig.read_bytes())
        for each in "image.json", "image.json.sig":
            self.operator.bring(f"/etc/llmkeep/kubernetes/{each}", (BUILT / each).read_bytes())
        self.operator.bring("/etc/apt/keyrings/llmkeep.pgp", (ROOT / ".lab/keys/keyring.pgp").read_bytes())
        self.revision = "first"
        self.trust = ssl.create_default_context(cadata=given["test"]["ca.crt"].decode())

    def declare(self) -> None:
        """Write the overlay: `cpu`, with what a small machine can reserve, and the revision at its pods."""
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
            "resources": ["../../../../usr/local/share/llmkeep/kubernetes/overlays/cpu"],
            "patches": [{"target": {"kind": "StatefulSet"}, "patch": json.dumps(patch)}],
        }
        self.operator.bring(f"{OVERLAY}/kustomization.yaml", json.dumps(content).encode())

    def deploy(self) -> str:
        """By role kubernetes, which waits until all replicas are ready, and checks what the cluster has. What Ansible says."""
        self.declare()
        return self.operator.play(ROOT / "playbooks/kubernetes.yml")

    def checks(self) -> dict[str, dict[str, Any]]:
        """What the role's checks say, by their names."""
        play = {
            "hosts": "kubernetes",
            "tasks": [
                {
                    "ansible.builtin.include_tasks": str(ROOT / "playbooks/tasks/verify_role.yml"),
                    "vars": {"verified_role": "kubernetes"},
                },
                {
                    "ansible.builtin.copy": {
                        "dest": "/etc/checks",
                        "content": "{{ llmkeep_checks | to_json }}",
                    }
                },
            ],
        }
        (self.folder / "verify.yml").write_text(yaml.safe_dump([play]))
        self.operator.play(self.folder / "verify.yml")
        found = json.loads((self.operator.folder / "etc/checks").read_text())
        return {each["id"]: each for each in found}

    def ready(self) -> bool:
        """Whether all replicas are."""
        seen = self.cluster.kubectl("get", WORKLOAD, IN, "--output=jsonpath={.status.readyReplicas}")
        return seen == str(REPLICAS)

    def address(self) -> str:
        """The Service's."""
        return self.cluster.kubectl("get", "service/llm", IN, "--output=jsonpath={.spec.clusterIP}")

    def ask(
        self,
        address: str,
        client: str = CLIENTS[0],
        words: int = WORDS,
        kept: list[http.client.HTTPSConnection] | None = None,
    ) -> Said:
        """Ask by a connection of its own; with KEPT, by the one in there as long as the server keeps it."""
        question = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        body = json.dumps({**question, "max_tokens": words, "temperature": 0})
        key = self.given["test"][client].decode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        begun, connected, trouble = time.monotonic(), False, ""
        link = kept.pop() if kept else None
        try:
            if link is None or _closed(link):
                plain = socket.create_connection((address, 443), 5)
                connected = True
                plain.settimeout(60)
                link = http.client.HTTPSConnection(address)
                link.auto_open = 0  # not by itself: what it cannot send is lost
                link.sock = self.trust.wrap_socket(plain, server_hostname="localhost")
            connected = True
            link.request("POST", "/v1/chat/completions", body, headers)
            answer = link.getresponse()
            content = answer.read().decode()
            trouble = "" if answer.status == 200 else f"{answer.status} {content}"
        except (OSError, http.client.HTTPException) as problem:
            trouble = repr(problem)
        if link and link.sock:
            if kept is None or trouble:
                link.close()
            else:
                kept.append(link)
        return Said(begun, time.monotonic(), trouble, connected)

    @contextmanager
    def _clients(
        self, names: tuple[str, ...], work: Callable[[int, Event, list[Said]], None]
    ) -> Iterator[list[Said]]:
        """Each at WORK within the block; what became of their requests."""
        end = Event()
        said: list[Said] = []
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

        def works(number: int) -> None:
            with inside(network):
                work(number, end, said)

        with ThreadPoolExecutor(len(names)) as pool:
            clients = [pool.submit(works, each) for each in range(len(names))]
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

    def asked(self) -> AbstractContextManager[list[Said]]:
        """Clients that ask one question after the other, each by a connection of its own."""
        address = self.address()

        def work(number: int, end: Event, said: list[Said]) -> None:
            while not end.is_set():
                said.append(self.ask(address, CLIENTS[number]))
                end.wait(PAUSE)

        return self._clients(CLIENTS, work)

    def crowded(self) -> AbstractContextManager[list[Said]]:
        """The crowd, each at its own time: half of them keep their connections, and a few want long answers."""
        address, room = self.address(), BoundedSemaphore(AT_A_TIME)

        def work(number: int, end: Event, said: list[Said]) -> None:
            kept: list[http.client.HTTPSConnection] | None = [] if number % 2 else None
            words = FEW_WORDS if (number + 1) % 30 else WORDS
            due = time.monotonic() + EVERY * number / len(CROWD)
            while not end.wait(max(0, due - time.monotonic())):
                with room:
                    said.append(self.ask(address, CROWD[number], words, kept))
                due = max(due + EVERY, time.monotonic())

        return self._clients(CROWD, work)

    def pod(self, replica: int) -> list[Manifest]:
        """What kubelet says of a pod's containers, in the manifest's order."""
        status = json.loads(self.cluster.kubectl("get", f"pod/llm-{replica}", IN, "--output=json"))["status"]
        return [*status["initContainerStatuses"], *status["containerStatuses"]]

    def not_pulled(self, node: Node, image: str) -> str:
        """Why a pod on this node does not start that is to have an image pulled, though it may be there."""
        container = {
            "name": "waits",
            "image": image,
            "imagePullPolicy": "Always",
            "resources": {"limits": {"memory": "16Mi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pulls", "namespace": "llmkeep"},
            "spec": {
                "nodeName": node.name,
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 10001,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [container],
            },
        }
        self.cluster.kubectl("create", "-f", "-", stdin=json.dumps(pod))

        def waiting() -> dict[str, str]:
            got = json.loads(self.cluster.kubectl("get", "pod/pulls", IN, "--output=json"))
            (status,) = got["status"].get("containerStatuses") or [{"state": {}}]
            return dict(status["state"].get("waiting", {}))

        try:
            until(lambda: waiting().get("reason") == "ImagePullBackOff", 60)
            return waiting()["message"]
        finally:
            self.cluster.kubectl("delete", "pod/pulls", IN)

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
