"""The suite's labs: real hosts, in instances that never touch the user's. Each folder of tests has a kind of them."""

import fcntl
import os
from collections.abc import Iterator
from typing import Any

import pytest
from estate import HOSTS, ROOT, Client, Lab, open_client
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# Each of their tests has a lab that nothing else leans on.
SCENARIO_FILES = ("test_one_host.py", "test_roles.py", "test_roles_on_kernels.py")


class OneEstate(LoadScopeScheduling):  # type: ignore[misc]
    """Tests of the whole estate go to one worker, which has it; a scenario goes where there is room."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if any(file in nodeid for file in SCENARIO_FILES) else "estate"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneEstate:
    """Instead of marks by group, which xdist 3.8 no longer sees under pytest 9.2."""
    return OneEstate(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the estate, then what moves its clocks (a client of today trusts no certificate of the future), then
    the scenarios, which put its hosts back to snapshots."""
    items.sort(
        key=lambda item: (
            item.path.name in SCENARIO_FILES,
            item.get_closest_marker("moves_clocks") is not None,
        )
    )


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Lab:
    """The lab that the suite makes: of the kind that the tests' folder is named for."""
    [folder] = {item.path.parent.name for item in request.session.items}
    match folder:
        case "containers":
            return Lab("suite")
        case "kernels":
            return Lab("suite-kernel", ("inventory/lab", "inventory/lab-kernel"))
    raise pytest.UsageError(f"tests/lab/{folder} has no lab: put the test into containers or kernels")


@pytest.fixture(scope="session")
def floor(suite: Lab, worker_id: str, testrun_uid: str) -> Iterator[Lab]:
    """A lab with its snapshots; destroyed when the session ends, unless LAB_KEEP is set.

    Each worker has a lab of its own. The snapshots are made once, by whoever needs them first: from then on that lab is
    its worker's alone, who may have taken a host's power away when the other one comes.
    """
    lab = suite
    with (ROOT / ".lab" / f"{suite.instance}.lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        if handle.read() != testrun_uid:
            suite.floor()
            handle.truncate(0)
            handle.write(testrun_uid)
            handle.flush()
        if worker_id not in ("master", "gw0"):
            lab = Lab(f"{suite.instance}-{worker_id}", suite.inventories)
            lab.floor("--like", suite.instance)
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


@pytest.fixture(scope="module")
def floor_again(floor: Lab) -> Lab:
    """Both hosts as the snapshots have them, clocks included, whatever a test did with them."""
    for host in HOSTS:
        floor.run("restore", host, "floor")
    return floor


@pytest.fixture(scope="session")
def estate(floor: Lab) -> Lab:
    """The whole of `site.yml`, run on ops1 by the bundle's own means, from the suite's snapshots."""
    for host in HOSTS:
        floor.run("restore", host, "floor")
    floor.run("sink", "--clear")
    floor.site()
    return floor


@pytest.fixture(scope="session")
def client(estate: Lab) -> Client:
    """A key, the CA, and a port of 127.0.0.1 that leads to the edge."""
    return open_client(estate)
