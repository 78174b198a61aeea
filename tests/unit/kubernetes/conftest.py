from collections.abc import Iterator
from pathlib import Path

import pytest
from control_plane import ControlPlane, control_plane


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real control plane without nodes."""
    folder: Path = tmp_path_factory.mktemp("cluster") / "control-plane"
    with control_plane(folder) as running:
        yield running
