"""Each role's molecule scenario: fresh host, converge, idempotence, every check broken in turn, drift."""

import pytest
from conftest import HOSTS, ROOT, Lab

SCENARIOS = sorted(path.parent.name for path in (ROOT / "molecule").glob("*/scenario.yml"))


@pytest.fixture(scope="module")
def lab(floor: Lab) -> Lab:
    """Both hosts as the snapshots have them, clocks included."""
    for host in HOSTS:
        floor.run("restore", host, "floor")
    return floor


def test_every_role_has_a_scenario() -> None:
    roles = {path.name for path in (ROOT / "roles").iterdir() if not path.name.startswith("_")}
    assert set(SCENARIOS) == roles - {"vllm"}  # needs a GPU


@pytest.mark.parametrize("role", SCENARIOS)
def test_role(lab: Lab, role: str) -> None:
    lab.run("sink", "--clear")
    lab.outside("molecule", "reset", "--scenario-name", role)
    lab.outside("molecule", "test", "--scenario-name", role, "--destroy", "never", timeout=1800)
    assert lab.sink() == [], "the role tried to leave"
