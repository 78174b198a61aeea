"""What the tests of volumes share."""

from pathlib import Path

import pytest


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty image of 24 MiB."""
    path = tmp_path / "DISK-1"
    with path.open("wb") as stream:
        stream.truncate(24 << 20)
    return path
