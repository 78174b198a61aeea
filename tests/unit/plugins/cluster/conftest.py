import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_plane import ControlPlane, control_plane
from namespaces import inside, ip, namespace
from small_bundle import signing_keys
from waiting import until

GPUS = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real control plane and a hollow node with GPUS, in a network namespace: its kubelet listens at all addresses."""
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    own = namespace()
    ip(own, "link set lo up")
    folder = tmp_path_factory.mktemp("cluster") / "control-plane"
    with inside(own), control_plane(folder) as running:
        running.run(
            "node",
            "kubemark",
            morph="kubelet",
            name="node-1",
            kubeconfig=running.kubeconfig,
            kubelet_port=10250,
            kubelet_read_only_port=10255,
            use_host_image_service="false",
            extended_resources=f"nvidia.com/gpu={GPUS}",
        )
        until(lambda: "node-1" in running.kubectl("get", "nodes", "--output=name"), 60)
        running.kubectl("wait", "--for=condition=Ready", "node/node-1", "--timeout=60s")
        yield running
    os.close(own)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signing key and its certificate."""
    return signing_keys(tmp_path_factory.mktemp("keys"))
