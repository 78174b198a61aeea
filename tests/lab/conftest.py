"""The suite's labs: real hosts, in instances that never touch the user's. Each folder of tests has a kind of them."""

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from estate import (
    HOSTS,
    ROOT,
    WITH_LOGS,
    Client,
    Lab,
    answers,
    elasticsearch,
    open_client,
    require_programs,
    within,
)
from ledger import TIME_IS_UP, leave
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# Each of their tests is a scenario, which puts the hosts back to a snapshot of its own choice.
SCENARIO_FILES = ("test_roles.py", "test_roles_on_kernels.py")
WHOLE = pytest.StashKey[tuple[str | None, int]]()  # a snapshot, and how many tests had failed then
UNTIL = "LLMKEEP_UNTIL"  # variable with a moment, in seconds since 1970: no test begins after it
DAY = "LLMKEEP_SUITE_DAY"  # variable with the day since 1970 on which the run began, for all workers
LABS = "LLMKEEP_SUITE_LABS"  # variable with the path of a file: the names of the run's labs
# What begins first, in this order: the estate of which other files take copies, scenarios of the other worker meanwhile, and what
# takes longest, so that no worker is idle while the other one does the longest last.
FIRST = (
    "/test_estate.py",
    "/test_encrypted_estate.py",
    "[elasticsearch]",
    "[logstash]",
    "[luks]",
    "[ipsec]",
    "day_100",
    "/test_storage.py",
    "/test_storage_verbs.py",
    "/test_log_faults.py",
    "/test_lost_hosts.py",
    "/test_pages.py",
    "/test_logs.py",
    "/test_revocation.py",
    "/test_one_host.py",
    "/test_separate_mirror.py",
    "/test_two_edges.py",
    "[llm_training]",
    "/test_driver_upgrade.py",
    "/test_example_estate.py",
    "[keepalived]",
    "[edge]",
    "[operator_page]",
    "[vllm]",
    "/test_metrics.py",
    "/test_upgrade.py",
    "[llm_serving]",
    "[prometheus]",
    "[filebeat]",
)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file is one worker's, who has an estate of its own; a scenario, or what moves clocks, goes where there is room."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, name = nodeid.partition("::")
        return nodeid if file.endswith(SCENARIO_FILES) or "day_100" in name else file


class FailureReports:
    """Prints each failure at once: a run takes half an hour, and may be ended before its summary."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\nFAILED at {report.when}: {report.nodeid}\n{report.longreprtext}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[DAY] = str(int(time.time() // 86400))
        descriptor, os.environ[LABS] = tempfile.mkstemp(prefix="llmkeep-labs-")
        os.close(descriptor)
        config.pluginmanager.register(FailureReports())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave the test out once the run's time is up; the suite's last lines count such tests."""
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        pytest.skip(TIME_IS_UP)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Destroy the labs of all workers, unless LAB_KEEP is set; a worker that is done must not, since another may still copy from
    its lab.
    """
    if hasattr(session.config, "workerinput"):
        return
    file = Path(os.environ[LABS])
    names = sorted(set(file.read_text().split()))
    file.unlink()
    if "LAB_KEEP" in os.environ:
        return
    for name in names:
        done = Lab(name).run("destroy", check=False)
        if done.returncode:
            print(f"lab {name} was not destroyed: {done.stderr}")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Instead of marks by group, which xdist 3.8 no longer sees under pytest 9.2."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what is in FIRST, then the other files, then the scenarios that are left, of which each takes a few minutes; faults
    last. The last are left out where time is up: on every other day that is roles, so that neither is unseen for long.

    What comes after a test that moves clocks restores the hosts, and with them their clocks.
    """
    last = ("roles", "faults")[int(os.environ[DAY]) % 2]

    def rank(item: pytest.Item) -> tuple[bool, int]:
        if item.get_closest_marker("moves_clocks"):
            return False, FIRST.index("day_100")
        others = len(FIRST) + (item.path.name in SCENARIO_FILES)
        place = next((rank for rank, name in enumerate(FIRST) if name in item.nodeid), others)
        return item.path.parent.name == last, place

    items.sort(key=rank)


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Lab:
    """The lab that the suite makes: of the kind that the tests' folder is named for; roles and faults have containers, too."""
    folders = {item.path.parent.name for item in request.session.items}
    if folders == {"kernels"}:
        return Lab("suite-kernel", ("inventory/lab/hosts.yml", "inventory/lab-kernel"))
    if folders <= {"containers", "roles", "faults"}:
        return Lab("suite")
    raise pytest.UsageError(
        f"no lab has hosts for tests of {folders} in one run: containers, roles and faults, or kernels"
    )


@contextmanager
def first(what: str, run: str, mine: str) -> Iterator[str | None]:
    """Held while WHAT is made, once a RUN. Yields who has made it; None for the one who makes it now, in the lab MINE."""
    with (ROOT / ".lab" / f"{what}.lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        last, _, maker = handle.read().partition(" ")
        yield maker if last == run else None
        if last != run:
            handle.truncate(0)
            handle.write(f"{run} {mine}")


@pytest.fixture(scope="session")
def floor(suite: Lab, worker_id: str, testrun_uid: str) -> Lab:
    """A lab with its snapshots.

    Each worker has a lab of its own. The snapshots are made once, by the worker that needs them first: from then on that lab is
    this worker's alone, which may have taken a host's power away when the other one comes.
    """
    lab = suite if worker_id in ("master", "gw0") else Lab(f"{suite.instance}-{worker_id}", suite.inventories)
    with Path(os.environ[LABS]).open("a") as file:
        file.write(f"{suite.instance}\n{lab.instance}\n")
    with first(suite.instance, testrun_uid, suite.instance) as maker:
        if maker is None:
            suite.floor()
        if lab != suite:
            leave(suite.group)
            lab.floor("--like", suite.instance)
    return lab


@pytest.fixture(scope="module")
def floor_again(floor: Lab) -> Lab:
    """Both hosts as the snapshots have them, clocks included, whatever a test did with them."""
    for host in HOSTS:
        floor.run("restore", host, "floor")
    return floor


@dataclass
class Standing:
    """What the hosts of this worker's lab are like: the snapshot that the file before left whole, and this file's own."""

    found: str | None
    made: str | None = None


@pytest.fixture(scope="module", autouse=True)
def standing(request: pytest.FixtureRequest) -> Iterator[Standing]:
    """A file that is marked `leaves_it_whole` undoes what it did, and where it passed, the next one goes on with its estate."""
    session = request.session
    failed = session.testsfailed
    found, failed_then = session.stash.get(WHOLE, (None, 0))
    # What failed in the teardown of the last test is counted after this fixture's.
    standing = Standing(found if failed == failed_then else None)
    session.stash[WHOLE] = None, failed
    yield standing
    if request.node.get_closest_marker("leaves_it_whole") and session.testsfailed == failed:
        session.stash[WHOLE] = standing.made, failed


def made_once(
    lab: Lab, suite: Lab, run: str, name: str, make: Callable[[], object], standing: Standing
) -> Lab:
    """Both hosts as MAKE leaves them: made once a RUN and kept as the snapshot NAME, which all labs of the suite take."""
    with first(f"{suite.instance}-{name}", run, lab.instance) as maker:
        if maker is None:
            make()
            standing.made = name
            for host in HOSTS:
                lab.run("snapshot", host, name)
            return lab
    standing.made = name
    restored = HOSTS if standing.found != name else ()
    # Neither may meet the other one as it was: the control node keeps what it saw of a record.
    for host in restored:
        lab.run("power-off", host)
    for host in restored:
        if lab.instance != maker and name not in lab.snapshots(host):
            lab.run("snapshot", host, name, "--of", maker)
        lab.run("restore", host, name)
    lab.run("sink", "--clear")
    # A host answers before its volumes are open.
    up = "systemctl is-active --quiet llm-gateway@1.service llm-gateway@2.service nginx.service && echo up; true"
    within(240, "the gateways run", lambda: lab.on("llm1", up).strip() == "up")
    return lab


@pytest.fixture(scope="module")
def estate(floor: Lab, suite: Lab, testrun_uid: str, standing: Standing) -> Lab:
    """The whole estate by `site.yml` from the suite's snapshots: run on ops1 by the bundle's own means, on kernels from outside,
    since Ansible takes four times as long in one.

    Made once and kept as a snapshot, from which each file of tests starts in the lab of its worker, unless the one before left it
    whole.
    """

    def make() -> None:
        for host in HOSTS:
            made = floor.snapshots(host)
            floor.run("restore", host, "installed" if "installed" in made else "floor")
        floor.run("sink", "--clear")
        if suite.instance == "suite-kernel":
            floor.on("llm1", "rm -rf /srv/llmkeep")  # a container's weights, where its volume will be
            floor.run("site", timeout=1800)
        else:
            floor.site()

    return made_once(floor, suite, testrun_uid, "estate", make, standing)


@pytest.fixture(scope="module")
def logged(
    request: pytest.FixtureRequest, floor: Lab, suite: Lab, testrun_uid: str, standing: Standing
) -> Lab:
    """The estate with logs and documents: Elasticsearch on ops1, Filebeat on both. A file that uses it opens its own client."""
    require_programs("elasticsearch", "filebeat")

    def make() -> None:
        estate: Lab = request.getfixturevalue("estate")
        estate.on(
            "ops1",
            f"llmkeep site {WITH_LOGS} --tags elasticsearch,documents,llm_serving,edge,filebeat",
            timeout=900,
        )

    made = made_once(floor, suite, testrun_uid, "logged", make, standing)
    # Both start with their hosts, and take their time.
    elasticsearch(made, "GET", "/logs-llmkeep.*/_count")
    answers(open_client(made))
    return made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright is in the payload's environment alone, which has the same Python."""
    sys.path.append(str(ROOT / "payload/tests/helpers"))
    sys.path += map(str, ROOT.glob("payload/.venv/lib/python3.*/site-packages"))
    from browser import CHROMIUM, launched

    if not CHROMIUM:
        pytest.skip("needs chromium-headless-shell of requirements.apt")
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def client(estate: Lab) -> Client:
    """A key, the CA, and a port of 127.0.0.1 that leads to the edge."""
    return open_client(estate)
