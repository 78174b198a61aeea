"""Our replicas on real nodes: what role kubernetes brings there, the mirror that nodes pull from, and clients that ask."""

import base64
import http.client
import json
import os
import select
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import Any

import yaml
from control_node import ControlNode
from control_plane import ControlPlane
from kustomized import IMAGE, Manifest
from mirror_here import authority, certify, configured, mirror
from namespaces import inside
from plugin_modules import ROOT
from pod_given import MODEL, Given
from pod_here import SERVING
from real_nodes import MASTER, Node
from waiting import until

from llmkeep.image import archive, served
from llmkeep.image.layout import INDEX, REFERENCE, Layout, encoded
from llmkeep.places import Places

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
            each
            for each in (ROOT / "docs/operate/image.md").read_text().split("```")
            if "capabilities =" in each
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
def registry(folder: Path, nodes: list[Node], built: Path = BUILT) -> Iterator[Registry]:
    """It runs where the control plane does, and has this image."""
    hosts = {f"{each.name}.estate.internal": each.address for each in nodes}
    with authority(folder / "control") as places:
        for each in nodes:
            certify(places, each.name, f"{each.name}.estate.internal")
        certify(places, "ada", "ada.estate.internal")
        (folder / "mirror").mkdir()
        served.add(Places(folder / "mirror"), built, ROOT / ".lab/keys/keyring.pgp")
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
        self,
        cluster: ControlPlane,
        nodes: list[Node],
        given: Given,
        folder: Path,
        images: Registry,
        built: Path = BUILT,
        overlay: str = "cpu",
        engine: Manifest = ENGINE,
    ) -> None:
        """BUILT: the image. OVERLAY: ours. ENGINE: resources of its engine."""
        self.cluster, self.nodes, self.given, self.folder, self.images = cluster, nodes, given, folder, images
        self.overlay, self.engine = overlay, engine
        clusters = [{**CLUSTER, "replicas": {"llm": REPLICAS}, "seconds": SECONDS}]
        self.operator = ControlNode(folder / "ops1", {"kubernetes_clusters": clusters})
        self.operator.bring(CLUSTER["kubeconfig"], cluster.kubeconfig.read_bytes())
        for each in "image.json", "image.json.sig":
            self.operator.bring(f"/etc/llmkeep/kubernetes/{each}", (built / each).read_bytes())
        self.operator.bring("/etc/apt/keyrings/llmkeep.pgp", (ROOT / ".lab/keys/keyring.pgp").read_bytes())
        self.revision = "first"
        self.trust = ssl.create_default_context(cadata=given["test"]["ca.crt"].decode())

    def declare(self) -> None:
        """Write the overlay: ours, with what a small machine can reserve, and the revision at its pods."""
        patch = [
            {"op": "test", "path": "/spec/template/spec/initContainers/3/name", "value": "engine"},
            {"op": "replace", "path": "/spec/template/spec/initContainers/3/resources", "value": self.engine},
            {
                "op": "add",
                "path": "/spec/template/metadata/annotations",
                "value": {"revision": self.revision},
            },
        ]
        content = {
            "resources": [f"../../../../usr/local/share/llmkeep/kubernetes/overlays/{self.overlay}"],
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
