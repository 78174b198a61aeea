"""The suite's own lab: real hosts, in an instance that never touches the user's."""

import base64
import fcntl
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / ".venv" / "bin" / "lab"
# As an operator types it on the control node.
HOSTS = ("ops1", "llm1")
SITE = "llmkeep site -i inventory/lab"
# Each of their tests has a lab that nothing else leans on.
SCENARIO_FILES = ("test_one_host.py", "test_roles.py")


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


@dataclass(frozen=True)
class Lab:
    """One instance of the lab, driven through its command line as a person would."""

    instance: str = "suite"

    def run(
        self, *args: str, check: bool = True, timeout: float = 900, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `lab ARGS`, which reads GIVEN; with `check`, a non-zero exit fails the test with the command's own output."""
        environment = {
            **os.environ,
            "LAB_INSTANCE": self.instance,
            "PATH": f"{LAB.parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(
            [str(LAB), *args],
            input=given,
            capture_output=True,
            text=True,
            errors="replace",  # a host's files may hold anything
            timeout=timeout,
            env=environment,
            cwd=ROOT,
            check=False,
        )
        if check and done.returncode:
            # Where one host failed, the others go on: what it said may be far from the end.
            _, fatal, said = done.stdout.partition("fatal: ")
            pytest.fail(
                f"lab {' '.join(args)} exited {done.returncode}\n{fatal}{said[:3000]}\n…\n"
                f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def on(
        self, host: str, command: str, check: bool = True, timeout: float = 900, given: str | None = None
    ) -> str:
        """What the shell command COMMAND prints on HOST, where it reads GIVEN."""
        return self.run(
            "exec", host, "--", "sh", "-c", command, check=check, timeout=timeout, given=given
        ).stdout

    def send(self, host: str, place: str, parts: Mapping[str, Path]) -> None:
        """Put files and folders below PLACE on HOST, each under its name there."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as tar:
            for name, path in parts.items():
                tar.add(path, name)
        text = base64.encodebytes(content.getvalue()).decode()
        self.on(host, f"mkdir -p {place} && base64 -d | tar -xz -C {place}", given=text)

    def outside(
        self, *argv: str, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run ARGV on this machine, inside the lab's network namespace."""
        return self.run("netns", "--", *argv, check=check, timeout=timeout)

    def site(self, *args: str) -> str:
        """Run `site.yml` as the estate does: on ops1, through ansible-runner."""
        return self.on("ops1", " ".join([SITE, *args]), timeout=1800)

    def sink(self) -> list[dict[str, Any]]:
        """Every packet and DNS question that was meant for elsewhere."""
        found: list[dict[str, Any]] = json.loads(self.run("sink", "--json").stdout)
        return found


def changed(output: str) -> dict[str, int]:
    """Changed tasks by host, out of Ansible's recap."""
    return {
        host: int(count)
        for host, count in re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", output, re.MULTILINE)
    }


@pytest.fixture(scope="session")
def floor(worker_id: str, testrun_uid: str) -> Iterator[Lab]:
    """A lab with its snapshots; destroyed when the session ends, unless LAB_KEEP is set.

    Each worker has a lab of its own. The snapshots are made once, by whoever needs them first: from then on that lab is
    its worker's alone, who may have taken a host's power away when the other one comes.
    """
    made = Lab()
    with (ROOT / ".lab" / "floor.lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        if handle.read() != testrun_uid:
            made.run("floor", timeout=2400)
            handle.truncate(0)
            handle.write(testrun_uid)
            handle.flush()
        lab = made
        if worker_id not in ("master", "gw0"):
            lab = Lab(f"{made.instance}-{worker_id}")
            lab.run("floor", "--like", made.instance, timeout=600)
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


@pytest.fixture(scope="session")
def estate(floor: Lab) -> Lab:
    """The whole of `site.yml`, run on ops1 by the bundle's own means, from the suite's snapshots."""
    for host in HOSTS:
        floor.run("restore", host, "floor")
    floor.run("sink", "--clear")
    floor.site()
    return floor


@dataclass(frozen=True)
class Client:
    """What `lab open` gave to any client of the estate."""

    url: str
    ca: Path
    key: str


@pytest.fixture(scope="session")
def client(estate: Lab) -> Client:
    """A key, the CA, and a port of 127.0.0.1 that leads to the edge."""
    return open_client(estate)


def open_client(lab: Lab) -> Client:
    lab.run("open")
    env_file = ROOT / ".lab" / "instances" / lab.instance / "env"
    assignments = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
    return Client(
        url=assignments["LLMKEEP_URL"],
        ca=Path(assignments["LLMKEEP_CA"]),
        key=Path(assignments["LLMKEEP_API_KEY_FILE"]).read_text().strip(),
    )
