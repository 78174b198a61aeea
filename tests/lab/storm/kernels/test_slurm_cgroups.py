"""What Slurm's jobs are refused where they are in a cgroup of their own, and that none of their processes outlives them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from estate import Lab, changed, within

INVENTORY = Path(__file__).with_name("slurm_hosts")
SCOPE = "ops1_slurmstepd.scope"
JOBS = "/srv/jobs"
DEVICE = "/srv/hwrng"


@pytest.fixture(scope="module")
def node() -> Iterator[Lab]:
    """A lab of one host, thrown away afterwards."""
    lab = Lab("slurm-kernel")
    lab.run("--inventory", str(INVENTORY), "floor", timeout=2400)
    lab.run("site", "--tags", "slurm_controller,slurm_node", timeout=1200)
    lab.on("ops1", f"install --directory --owner=llm-train {JOBS} && systemctl restart slurmd")
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


def submit(node: Lab, script: str) -> str:
    return node.on(
        "ops1", f"runuser -u llm-train -- sbatch --parsable --output={JOBS}/%j '--wrap={script}'"
    ).strip()


def ended(node: Lab, number: str) -> str:
    """The job's state once it has ended."""

    def state() -> str:
        return node.on(
            "ops1", f"scontrol show job {number} | sed -n 's/.*JobState=\\([A-Z_]*\\).*/\\1/p'"
        ).strip()

    within(60, f"job {number} ends", lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"))
    return state()


def test_a_process_that_left_its_parents_ends_with_its_job_and_not_with_slurmd(node: Lab) -> None:
    number = submit(node, "setsid --fork sleep 12345; sleep 12345")

    def sleepers() -> list[str]:
        return node.on("ops1", "pgrep -x sleep -u llm-train", check=False).split()

    within(60, "both run", lambda: len(sleepers()) == 2)
    node.on("ops1", "systemctl restart slurmd")
    for process in sleepers():
        assert f"{SCOPE}/job_{number}/" in node.on("ops1", f"cat /proc/{process}/cgroup")
    node.on("ops1", f"scancel {number}")
    assert ended(node, number) == "CANCELLED"
    within(30, "none is left", lambda: not sleepers())


def test_a_job_gets_no_device_but_those_of_its_scope(node: Lab) -> None:
    node.on("ops1", f"rm -f {DEVICE} && mknod -m 0666 {DEVICE} c 10 183")
    read = f"head --bytes=1 {DEVICE}"
    node.on("ops1", f"runuser -u llm-train -- {read}")
    number = submit(node, read)
    assert ended(node, number) == "FAILED"
    assert "Operation not permitted" in node.on("ops1", f"cat {JOBS}/{number}")


def test_a_job_that_takes_too_much_memory_costs_the_host_nothing(node: Lab) -> None:
    host = int(node.on("ops1", "awk '/MemTotal/ {print $2}' /proc/meminfo")) << 10
    bound = int(node.on("ops1", f"systemctl show --value --property=MemoryMax {SCOPE}"))
    assert bound == pytest.approx(0.9 * host, rel=0.01)
    node.on("ops1", f"systemctl set-property --runtime {SCOPE} MemoryMax=200M")
    number = submit(node, 'exec python3 -c "bytearray(400 << 20)"')
    assert ended(node, number) == "FAILED"
    node.on("ops1", f"systemctl set-property --runtime {SCOPE} MemoryMax=90%")
    assert ended(node, submit(node, "true")) == "COMPLETED"
    # The addresses of the scope, among other things, are a check of the role.
    assert changed(node.run("site", "--tags", "slurm_controller,slurm_node").stdout) == {"ops1": 0}
