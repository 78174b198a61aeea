import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_plane import ControlPlane, kube
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
