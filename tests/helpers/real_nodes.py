"""Real nodes: containerd, runc, CNI's plugins and kubelet, each node in namespaces of its own on this machine.

The control plane and clients are in one network namespace, each node in another one, with a bridge between them, and
none has a way to any other network.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from control_plane import SERVICES, START_SECONDS, ControlPlane
from hollow_nodes import ready
from namespaces import inside, ip, namespace
from plugin_modules import HELPERS
from waiting import until

CONTROLLERS = ["cpu", "cpuacct", "cpuset", "memory", "pids", "devices", "freezer", "blkio", "systemd"]
MASTER = "10.99.0.1"
PLUGINS = "/usr/lib/cni"
STOP_SECONDS = 30
# What a pod begins, of which there is to be nothing: it answers only.
SEEN = """
table ip seen {
  counter begun {}
  chain pods {
    type filter hook prerouting priority mangle;
    iifname "pods" ct state new counter name begun
  }
}
"""


class Node:
    """One node; what it is made of lies in its folder."""

    def __init__(self, cluster: ControlPlane, number: int, network: int, pause: str) -> None:
        self.name, self.address = f"node-{number}", f"10.99.0.{10 + number}"
        self.pods = f"10.244.{number}"
        self.cluster, self.network, self.pause = cluster, network, pause
        self.folder = cluster.folder / self.name
        self.socket = f"{self.folder}/containerd.sock"
        self.groups = {each: f"{_own_group(each)}/llmkeep-{os.getpid()}-{self.name}" for each in CONTROLLERS}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self.folder
        folder.mkdir()
        (folder / "cni").mkdir()
        (folder / "cni/pods.conflist").write_text(json.dumps(self._network()))
        (folder / "containerd.toml").write_text(self._containerd())
        (folder / "kubelet.yaml").write_text(json.dumps(self._kubelet()))
        kubeconfig = self.cluster.identity(f"system:node:{self.name}", ["system:nodes"])
        kubelet = [str(self.cluster.program), "kubelet", f"--config={folder}/kubelet.yaml"]
        kubelet += [
            f"--kubeconfig={kubeconfig}",
            f"--root-dir={folder}/kubelet",
            f"--hostname-override={self.name}",
        ]
        kubelet += [f"--node-ip={self.address}", "--node-labels=llmkeep.org/serving=true"]
        specification = {
            "name": self.name,
            "folder": str(folder),
            "groups": self.groups,
            "socket": self.socket,
            "programs": {
                "containerd": [
                    "containerd",
                    f"--config={folder}/containerd.toml",
                ],
                "kubelet": kubelet,
            },
        }
        (folder / "node.json").write_text(json.dumps(specification))
        argv = [
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        with inside(self.network), (folder / "node.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, sys.executable, HELPERS / "node_here.py", folder / "node.json"],
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        if self.process:
            self.process.kill()  # and so its child, and all that has begun there
            self.process.wait()
        until(lambda: not any(map(_processes, self.groups.values())), STOP_SECONDS)
        for each in self.groups.values():
            for path, _, _ in Path(each).walk(top_down=False):
                path.rmdir()

    def begun_by_pods(self) -> int:
        """How many flows the node's pods have begun."""
        with inside(self.network):
            shown = subprocess.check_output(["nft", "--json", "list", "counters", "table", "ip", "seen"])
        (counter,) = (each["counter"] for each in json.loads(shown)["nftables"] if "counter" in each)
        return int(counter["packets"])

    def answers(self) -> bool:
        """Whether containerd does; AssertionError if a program has ended."""
        ended = self.process is None or self.process.poll() is not None
        assert not ended, (self.folder / "node.log").read_text()
        return self._ctr("version").returncode == 0

    def ctr(self, *words: str, **more: Any) -> str:
        """What containerd's own client prints."""
        done = self._ctr(*words, **more)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def _ctr(self, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        client = ["ctr", f"--address={self.socket}", "--namespace=k8s.io", *words]
        return subprocess.run(client, capture_output=True, check=False, **more)

    def take(self, layout: Path, name: str) -> None:
        """An image of an OCI layout, as `NAME@DIGEST`."""
        with subprocess.Popen(
            ["tar", "-C", layout, "--dereference", "-c", "."], stdout=subprocess.PIPE
        ) as archive:
            self.ctr(
                "images", "import", f"--base-name={name}", "--digests", "--local", "-", stdin=archive.stdout
            )

    def _network(self) -> dict[str, Any]:
        ipam = {
            "type": "host-local",
            "dataDir": f"{self.folder}/addresses",
            "ranges": [[{"subnet": f"{self.pods}.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipMasq": False, "ipam": ipam}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}

    def _containerd(self) -> str:
        folder = self.folder
        return f"""
version = 2
root = "{folder}/containerd"
state = "/run/containerd"
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{self.pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{folder}/certs.d"
"""

    def _kubelet(self) -> dict[str, Any]:
        certificate, key = self.cluster.keys.issued("kubelet", server=True)
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "healthzBindAddress": self.address,
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "tlsMinVersion": "VersionTLS13",
            "authentication": {"x509": {"clientCAFile": str(self.cluster.keys.ca)}},
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "makeIPTablesUtilChains": False,
            "resolvConf": "",
            "podLogsDir": f"{self.folder}/logs",
            "volumePluginDir": f"{self.folder}/plugins",
            # By the machine's disk, which is not the node's alone.
            "evictionHard": {
                "nodefs.available": "1Gi",
                "imagefs.available": "1Gi",
                "memory.available": "100Mi",
            },
            "imageGCHighThresholdPercent": 100,
        }


def _processes(group: str) -> bool:
    """Whether a control group, or one below it, has any."""
    return any(file.read_text() for file in Path(group).rglob("cgroup.procs"))


def _own_group(controller: str) -> str:
    """This process's control group."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers.removeprefix("name=") == controller:
            return f"/sys/fs/cgroup/{controller}{path}".rstrip("/")
    raise ValueError(f"no control groups of version 1 for {controller}")


def _proxy(cluster: ControlPlane) -> None:
    """kube-proxy where clients are, so that Services have their addresses there."""
    configuration = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "bindAddress": MASTER,
        "healthzBindAddress": f"{MASTER}:10256",
        "metricsBindAddress": f"{MASTER}:10249",
        "hostnameOverride": "clients",
        "clientConnection": {"kubeconfig": str(cluster.identity("system:kube-proxy", []))},
        "conntrack": {"maxPerCore": 0},  # the machine's
    }
    file = cluster.folder / "proxy.yaml"
    file.write_text(json.dumps(configuration))
    cluster.run("kube-proxy", "kube-proxy", config=file)


@contextmanager
def real_nodes(
    folder: Path, count: int, pause: str, layouts: dict[str, Path]
) -> Iterator[tuple[ControlPlane, list[Node]]]:
    """A cluster of nodes that are ready and have these images, by name; for this thread alone."""
    networks = [namespace() for _ in range(count + 1)]
    master, *others = networks
    ip(
        master,
        "link set lo up",
        "link add nodes type bridge",
        f"address add {MASTER}/24 dev nodes",
        "link set nodes up",
        f"route add {SERVICES} dev nodes",  # kube-proxy gives each packet another address
    )
    nodes: list[Node] = []
    try:
        with inside(master):
            cluster = ControlPlane(folder, MASTER, also=[f"10.99.0.{11 + each}" for each in range(count)])
        for number, network in enumerate(others, start=1):
            node = Node(cluster, number, network, pause)
            end = f"/proc/{os.getpid()}/fd/{network}"
            ip(
                master,
                f"link add {node.name} type veth peer name eth0 netns {end}",
                f"link set {node.name} master nodes up",
                f"route add {node.pods}.0/24 via {node.address}",
            )
            ip(
                network,
                "link set lo up",
                f"address add {node.address}/24 dev eth0",
                "link set eth0 up",
                f"route add {SERVICES} via {MASTER}",
            )
            with inside(network):
                Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
                subprocess.run(["nft", "--file", "-"], input=SEEN, text=True, check=True)
            nodes.append(node)
        for node in nodes:
            for other in nodes:
                if other is not node:
                    ip(node.network, f"route add {other.pods}.0/24 via {other.address}")
        with inside(master), ExitStack() as ends:
            cluster.start()
            ends.callback(cluster.stop)
            _proxy(cluster)
            for node in nodes:
                ends.callback(node.stop)
                node.start()
            for node in nodes:
                until(node.answers, START_SECONDS)
                for name, layout in layouts.items():
                    node.take(layout, name)
            until(lambda: ready(cluster, "nodes") == count, START_SECONDS)
            yield cluster, nodes
    finally:
        for each in networks:
            os.close(each)


def missing() -> list[str]:
    """What a node needs and this machine lacks."""
    programs = ("containerd", "ctr", "runc", "nft", "setpriv", "unshare")
    lacking = [each for each in programs if not shutil.which(each)]
    lacking += [] if Path(PLUGINS, "bridge").exists() else ["CNI's plugins"]
    # Version 2 would be mounted in another way, and was never tried.
    lacking += [] if Path("/sys/fs/cgroup/systemd").is_dir() else ["control groups of version 1"]
    return lacking + ([] if os.geteuid() == 0 else ["root"])
