"""The molecule scenario of each role that needs a kernel of its own."""

import pytest
from estate import Lab, run_scenario, scenarios


@pytest.mark.parametrize("role", scenarios("kernel"))
def test_role(floor_again: Lab, role: str) -> None:
    run_scenario(floor_again, role)
