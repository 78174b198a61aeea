"""Hollow nodes: real kubelets without containers, which say of each pod that it runs.

They listen on all addresses, fixed in their code: so they and their control plane are in a network namespace that has
loopback alone. All pods have one address, where a server answers their probes.
"""

import http.server
import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from control_plane import START_SECONDS, ControlPlane, control_plane
from namespaces import inside, ip, namespace
from waiting import own_port, until

POD_ADDRESS = "192.168.192.168"  # kubemark's


class Probed(http.server.BaseHTTPRequestHandler):
    """Every pod is ready, by the path of our manifests."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def hollow_nodes(folder: Path, count: int, port: int) -> Iterator[ControlPlane]:
    """A cluster with so many nodes that are ready, whose pods' probes are answered at this port; for this thread alone."""
    network = namespace()
    ip(network, "link set lo up", f"address add {POD_ADDRESS}/32 dev lo")
    try:
        with inside(network), control_plane(folder / "control-plane") as cluster:
            certificate, key = cluster.keys.issued("pods", server=True)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(certificate, key)
            server = http.server.ThreadingHTTPServer((POD_ADDRESS, port), Probed)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
            Thread(target=server.serve_forever, daemon=True).start()
            for number in range(count):
                cluster.run(
                    f"hollow-{number}",
                    "kubemark",
                    morph="kubelet",
                    name=f"hollow-{number}",
                    kubeconfig=cluster.kubeconfig,
                    kubelet_port=own_port(),
                    kubelet_read_only_port=own_port(),
                    use_host_image_service="false",
                    extended_resources="nvidia.com/gpu=8",
                    node_labels="llmkeep.org/serving=true",
                    kube_api_qps=100,
                    kube_api_burst=200,
                )
            until(lambda: ready(cluster, "nodes") == count, START_SECONDS)
            try:
                yield cluster
            finally:
                server.shutdown()
    finally:
        os.close(network)


def ready(cluster: ControlPlane, kind: str, *options: str) -> int:
    """How many objects of a kind have the condition Ready."""
    items = json.loads(cluster.kubectl("get", kind, *options, "--output=json"))["items"]
    conditions = [each.get("status", {}).get("conditions", []) for each in items]
    return sum(any(one["type"] == "Ready" and one["status"] == "True" for one in each) for each in conditions)
