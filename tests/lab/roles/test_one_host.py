"""The same `site.yml` on an estate that is not the lab's: one host, in every group, under other names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from estate import Lab, changed

INVENTORY = Path(__file__).with_name("one_host")
HOST = "box"


@pytest.fixture
def one_host() -> Iterator[Lab]:
    """A lab of its own, thrown away afterwards."""
    lab = Lab("one-host")
    yield lab
    lab.run("destroy")


def test_one_host_in_every_group_bootstraps_itself_and_answers(one_host: Lab) -> None:
    output = one_host.run("--inventory", str(INVENTORY), "demo", timeout=2400).stdout
    assert "Paris" in output
    assert "TLSv1.3" in output
    checked = one_host.run("site", "--check", timeout=900).stdout
    assert changed(checked) == {HOST: 0}
    again = one_host.run("site", timeout=900).stdout
    assert changed(again) == {HOST: 0}
