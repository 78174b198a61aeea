"""The molecule scenario of each role that a container can have."""

import pytest
from control_plane import kube
from estate import ROOT, Lab, require_programs, run_scenario, scenarios

PROGRAMS = {
    "elasticsearch": ("elasticsearch",),
    "filebeat": ("elasticsearch", "filebeat"),
    "kibana": ("elasticsearch",),
    "logstash": ("elasticsearch", "filebeat"),
}


def test_every_role_has_a_scenario() -> None:
    roles = {path.name for path in (ROOT / "roles").glob("[!_]*/")}
    assert set(scenarios("container") + scenarios("kernel")) == roles


@pytest.mark.parametrize("role", scenarios("container"))
def test_role(floor_again: Lab, role: str) -> None:
    if role == "kubernetes":
        kube()
    require_programs(*PROGRAMS.get(role, ()))
    run_scenario(floor_again, role)
    if role == "audit":  # its last look would tell the next scenario's host of records that this one had
        floor_again.on("ops1", "systemctl stop llmkeep-audit-witness.timer llmkeep-audit-witness.service")
