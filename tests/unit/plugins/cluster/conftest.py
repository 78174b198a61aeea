import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_overlay import manifests, signed_image
from control_plane import ControlPlane, kube
from deployed_cluster import Estate
from hollow_nodes import hollow_nodes
from namespaces import namespace
from small_bundle import signing_keys


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real control plane and a hollow node with eight GPUs."""
    kube()
    try:
        os.close(namespace())
    except OSError as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    with hollow_nodes(tmp_path_factory.mktemp("cluster"), 1, 8443) as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signing key and its certificate."""
    return signing_keys(tmp_path_factory.mktemp("keys"))


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
